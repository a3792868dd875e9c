"""Commands on paths: split, generate, data show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from autodeco.cli.options import JsonObject

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
_SEED = click.IntRange(min=0, max=2**63 - 1)
_SHARE = click.FloatRange(0, 1)


def add_tool_commands(group: click.Group) -> None:
    """Adds the commands that work on paths."""
    for command in (split, generate, data):
        group.add_command(command)


@click.command()
@click.option("--input", "source", type=_PATH, required=True, help="A merged checkpoint.")
@click.option("--output", type=_PATH, required=True, help="The heads directory to write.")
@click.option("--base", type=_PATH, help="Write the base model here as well.")
@click.option("--copy", is_flag=True, help="Copy the base's weights instead of linking them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def split(source: Path, output: Path, base: Path | None, copy: bool, as_json: bool) -> None:
    """Take the heads out of a merged checkpoint: the inverse of merge.

    Example: autodeco split --input merged --output my-heads
    """
    from rich.console import Console

    from autodeco.convert.workers import BytesProgress
    from autodeco.heads.merge import split as split_files

    def progress(total: int) -> BytesProgress:
        return BytesProgress(Console(stderr=True), "split", total)

    written = str(split_files(source, output, base=base, copy=copy, progress=progress))
    made = {"output": written, **({"base": str(base)} if base else {})}
    click.echo(json.dumps(made) if as_json else "\n".join(made.values()))


@click.command()
@click.option("--model", type=_PATH, required=True, help="A merged checkpoint, or a base.")
@click.option("--heads-dir", "heads", type=_PATH, help="Heads, when the model is a base.")
@click.option("--prompt", required=True, help="The prompt, formatted as the model expects it.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message for the chat template.")
@click.option("--max-new-tokens", type=_COUNT, default=256, show_default=True)
@click.option("--temperature-scale", type=float, help="Multiplier on the predicted T.")
@click.option("--top-p-scale", type=float, help="Multiplier on the predicted P.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the sampling.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--chat-template-kwargs", type=JsonObject(), help="JSON for the chat template.")
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


@click.group()
def data() -> None:
    """Look at training data as the trainer sees it.

    Example: autodeco data show --data train.jsonl --model DIR
    """


@data.command("show")
@click.option("--data", "path", type=_PATH, required=True, help="JSONL.")
@click.option("--model", type=_PATH, required=True, help="The checkpoint; also drops, as trained.")
@click.option("--limit", type=_COUNT, default=3, show_default=True, help="Samples shown.")
@click.option("--max-length", type=_COUNT, default=6144, show_default=True)
@click.option("--eos-loss/--no-eos-loss", default=True)
@click.option("--drop", type=_SHARE, default=0.0, show_default=True, help="Share that is dropped.")
@click.option("--seed", type=_SEED, default=0, show_default=True)
@click.option("--chat-template-kwargs", type=JsonObject(), help="JSON for the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(as_json: bool, chat_template_kwargs: dict[str, Any] | None, **options: Any) -> None:
    """Print samples with their kept, masked and dropped tokens.

    Example: autodeco data show --data train.jsonl --model DIR --drop 0.6
    """
    from autodeco.training.show import show_samples

    shown = show_samples(chat_template_kwargs=chat_template_kwargs or {}, **options)
    if as_json:
        click.echo(json.dumps([sample.to_json() for sample in shown], ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for sample in shown:
        console.print(sample.render())
