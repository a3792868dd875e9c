"""Commands on paths: export, merge, split, generate, evaluate, data show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)


def add_tool_commands(group: click.Group) -> None:
    """Adds the commands that work on paths."""
    for command in (export, merge, split, generate, evaluate, data):
        group.add_command(command)


@click.command()
@click.option("--input", "source", type=_PATH, required=True, help="A run, or its checkpoints.")
@click.option("--output", type=_PATH, required=True, help="The heads directory to write.")
@click.option("--checkpoint", default="best", help="best, last or a step.  [default: best]")
@click.option(
    "--save-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="Dtype of the saved heads.",
)
def export(source: Path, output: Path, checkpoint: str, save_dtype: str) -> None:
    """Write the heads of a checkpoint as a heads directory.

    Example: autodeco export --input runs/NAME/TIME --output my-heads --checkpoint last
    """
    from autodeco.heads.files import load_heads, save_heads
    from autodeco.training.checkpoint import find_checkpoint

    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = find_checkpoint(folder, checkpoint)
    loaded = load_heads(found)
    metadata = {**loaded.metadata, "checkpoint": found.name}
    save_heads(output, loaded.heads, metadata=metadata, dtype=save_dtype)
    click.echo(f"{output} from {found}")


@click.command()
@click.option("--base", type=_PATH, required=True, help="The base checkpoint.")
@click.option("--heads", type=_PATH, required=True, help="A heads directory or file.")
@click.option("--output", type=_PATH, required=True, help="The merged checkpoint to write.")
@click.option("--layout", type=click.Choice(["native", "autodeco"]), default="native")
@click.option("--copy", is_flag=True, help="Copy the base, even where it could be linked.")
def merge(base: Path, heads: Path, output: Path, layout: str, copy: bool) -> None:
    """Join a base checkpoint and heads in one directory, without copying the base.

    Example: autodeco merge --base DIR --heads my-heads --output merged
    """
    from autodeco.heads.merge import merge as merge_files

    report = merge_files(base, heads, output, layout=layout, copy=copy)
    click.echo(f"{output}: {report.describe()}")


@click.command()
@click.option("--input", "source", type=_PATH, required=True, help="A merged checkpoint.")
@click.option("--output", type=_PATH, required=True, help="The heads directory to write.")
def split(source: Path, output: Path) -> None:
    """Take the heads out of a merged checkpoint: the inverse of merge.

    Example: autodeco split --input merged --output my-heads
    """
    from autodeco.heads.merge import split as split_files

    click.echo(str(split_files(source, output)))


@click.command()
@click.option("--model", type=_PATH, required=True, help="A merged checkpoint, or a base.")
@click.option("--heads", type=_PATH, help="Heads, when the model is a base checkpoint.")
@click.option("--prompt", required=True, help="The prompt, formatted as the model expects it.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message for the chat template.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--temperature-scale", type=float, help="Multiplier on the predicted T.")
@click.option("--top-p-scale", type=float, help="Multiplier on the predicted P.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print tokens, T and P as JSON.")
def generate(as_json: bool, **options: Any) -> None:
    """Generate text; each token is coloured by its temperature and top-p.

    Example: autodeco generate --model merged --prompt "12 + 30."
    """
    from autodeco.decoding.command import generate_text

    result = generate_text(**options)
    if as_json:
        click.echo(json.dumps(result.to_json(), ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(result.render())


@click.command()
@click.option("--model", type=_PATH, required=True, help="A merged checkpoint, or a base.")
@click.option("--heads", type=_PATH, help="Heads, when the model is a base checkpoint.")
@click.option("--problems", type=_PATH, required=True, help="JSONL of problem and gt.")
@click.option("--output", type=_PATH, required=True, help="Directory for report and results.")
@click.option("--limit", type=int, default=256, show_default=True, help="At most so many problems.")
@click.option("--samples", type=int, default=1, show_default=True, help="Answers a problem.")
@click.option("--max-new-tokens", type=int, default=2048, show_default=True)
@click.option("--seed", type=int, default=1234, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(as_json: bool, **options: Any) -> None:
    """Measure accuracy and entropy: baselines, and the heads over their dial.

    Example: autodeco evaluate --model merged --problems test.jsonl --output report
    """
    from rich.console import Console

    from autodeco.decoding.command import evaluate_checkpoint

    console = Console(stderr=as_json)
    outcome = evaluate_checkpoint(console=console, **options)
    if as_json:
        click.echo(json.dumps(outcome.results, indent=2))
        return
    console.print(outcome.table)
    console.print(f"{outcome.verdict}\nreport: {outcome.report}", highlight=False)


@click.group()
def data() -> None:
    """Look at training data as the trainer sees it."""


@data.command("show")
@click.option("--data", "path", type=_PATH, required=True, help="JSONL.")
@click.option("--model", type=_PATH, required=True, help="The checkpoint; also drops, as trained.")
@click.option("--limit", type=int, default=3, show_default=True, help="Samples shown.")
@click.option("--max-length", type=int, default=6144, show_default=True)
@click.option("--eos-loss/--no-eos-loss", default=True)
@click.option("--drop", type=float, default=0.0, show_default=True, help="Share that is dropped.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chat-template-kwargs", default="{}", help="JSON for the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(as_json: bool, chat_template_kwargs: str, **options: Any) -> None:
    """Print samples with their kept, masked and dropped tokens.

    Example: autodeco data show --data train.jsonl --model DIR --drop 0.6
    """
    from autodeco.training.show import show_samples

    try:
        kwargs = json.loads(chat_template_kwargs)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"--chat-template-kwargs is no JSON: {error}") from error
    shown = show_samples(chat_template_kwargs=kwargs, **options)
    if as_json:
        click.echo(json.dumps([sample.to_json() for sample in shown], ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for sample in shown:
        console.print(sample.render())
