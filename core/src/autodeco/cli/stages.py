"""``run``, and its stages alone; all take the same options.

``export``, ``merge`` and ``evaluate`` work on the run of their job; with ``--output`` they, and
``import``, work on paths instead, without a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from autodeco.cli import paths
from autodeco.cli.options import given, job_options

_PATH = click.Path(path_type=Path)
_STAGES = {
    "run": (None, "Go the whole way: import, build, attach, train, export, merge, evaluate."),
    "import": (("import",), "Check a checkpoint against its plugin's weight map."),
    "train": (("import", "build", "attach", "train"), "Train the heads."),
    "export": (("export",), "Write the heads of a checkpoint as a heads directory."),
    "merge": (("merge",), "Join base and heads in one directory, without copying the base."),
    "evaluate": (("evaluate",), "Measure accuracy and entropy: baselines, heads over their dial."),
}
_EXAMPLES = {
    "import": "--model DIR --format torch_dist --output imported",
    "export": "--input runs/NAME/TIME --output my-heads --checkpoint last",
    "merge": "--model DIR --heads-dir my-heads --output merged",
    "evaluate": "--model merged --problems test.jsonl --output report",
}
_ON_PATHS: dict[str, Callable[..., Any]] = {
    "import": paths.import_weights,
    "export": paths.export,
    "merge": paths.merge,
    "evaluate": paths.evaluate,
}
_PATH_OPTIONS = {
    "import": {
        "format": "What to write; torch_dist: a megatron-core checkpoint.",
        "nemo_python": "NeMo's Python, which adds context/: a NeMo 2 checkpoint (docs/nemo.md).",
    },
    "export": {
        "input": "A run, its checkpoints, or one of them; a NeMo 2 checkpoint; an import.",
        "target": "What to write: the heads (hf-peft, the default) or the whole backbone (hf).",
    },
    "merge": {"heads_dir": "The heads (directory or file) to merge into --model."},
    "evaluate": {"heads_dir": "The heads, when --model is a base checkpoint."},
}
_PLANNED_ON_PATHS = ("import", "merge")  # from the headers alone
_CHOICES = {
    "format": click.Choice(["hf", "torch_dist"]),
    "target": click.Choice(["hf-peft", "hf"]),
}


def add_stage_commands(group: click.Group) -> None:
    """Adds ``run`` and the stages."""
    for name, (stages, text) in _STAGES.items():
        group.add_command(_stage_command(name, stages, text))


def _stage_command(name: str, stages: tuple[str, ...] | None, text: str) -> click.Command:
    example = f"autodeco {name} --plugin FAMILY --model DIR --data train.jsonl --out runs"
    if name in _EXAMPLES:
        example += f"\n\nOn paths, without a run:\n\nExample: autodeco {name} {_EXAMPLES[name]}"

    @click.command(name, help=f"{text}\n\nExample: {example}")
    @click.option(
        "--config",
        type=_PATH,
        help="YAML, TOML or JSON file of these options; a run's job.json is one.",
    )
    @click.option(
        "--dry-run",
        is_flag=True,
        help="Print the resolved job, or on paths what would be written; do nothing.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
    @job_options
    def command(config: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
        on_paths = {key: options.pop(key, None) for key in ("output", *_PATH_OPTIONS.get(name, ()))}
        if any(value is not None for value in on_paths.values()):
            if config is not None or (dry_run and name not in _PLANNED_ON_PATHS):
                raise click.UsageError("--config and --dry-run are for a job, not for --output")
            on_paths |= {"dry_run": True} if dry_run else {}
            _ON_PATHS[name](given(options), as_json, **on_paths)
        else:
            if name == "evaluate":
                paths.refuse_merged(options)
            run_stages(stages, config, dry_run, as_json, given(options))

    if name in _ON_PATHS:
        command.params += [
            click.Option(
                ["--" + key.replace("_", "-")],
                type=_CHOICES.get(key, _PATH),
                help=f"{text} [paths]",
            )
            for key, text in _PATH_OPTIONS[name].items()
        ]
        text = "Work on paths and write this directory. [paths]"
        command.params.append(click.Option(["--output"], type=_PATH, help=text))
    return command


def run_stages(
    stages: tuple[str, ...] | None,
    config: Path | None,
    dry_run: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Resolves the job, then runs or prints it."""
    from rich.console import Console

    from autodeco.processes import rank
    from autodeco.registry import Registry
    from autodeco.settings import resolve

    registry = Registry()
    resolved = resolve(options, config, registry)
    if dry_run:
        _print_job(resolved, as_json)
        return
    from autodeco.pipeline import run_job
    from autodeco.stopping import stop_at_once

    first = rank() == 0  # the others say nothing: one document, one table
    console = Console(stderr=as_json, quiet=not first)
    with stop_at_once():  # the training, which can go on from a checkpoint, has its own way
        summary = run_job(
            resolved.job,
            registry=registry,
            stages=stages,
            console=console,
            resolution=resolved.resolution,
        )
    if not first:
        return
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=2))
        return
    if summary.evaluation is not None:
        console.print(summary.evaluation)
    console.print(summary.table())


def _print_job(resolved: Any, as_json: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    values = resolved.job.to_json()
    if as_json:
        origins = dict(resolved.provenance)
        click.echo(json.dumps({"job": values, "provenance": origins}, indent=2))
        return
    table = Table("option", "value", "from", title="the job; nothing is run", title_justify="left")
    for name, value in values.items():
        table.add_row(name, escape(str(value)), escape(resolved.provenance[name]))
    Console().print(table)
