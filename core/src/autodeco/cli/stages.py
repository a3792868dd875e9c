"""``run``, and its stages alone; all take the same options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from autodeco.cli.options import given, job_options

_STAGES = {
    "run": (None, "Go the whole way: import, build, attach, train, export, merge, evaluate."),
    "import": (("import",), "Check a checkpoint against its plugin's weight map."),
    "train": (("import", "build", "attach", "train"), "Train the heads."),
}


def add_stage_commands(group: click.Group) -> None:
    """Adds ``run``, ``import`` and ``train``."""
    for name, (stages, text) in _STAGES.items():
        group.add_command(_stage_command(name, stages, text))


def _stage_command(name: str, stages: tuple[str, ...] | None, text: str) -> click.Command:
    example = f"autodeco {name} --plugin FAMILY --model DIR --data train.jsonl --out runs"

    @click.command(name, help=f"{text}\n\nExample: {example}")
    @click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="YAML, TOML or JSON file of these options; a run's job.json is one.",
    )
    @click.option("--dry-run", is_flag=True, help="Print the resolved job and do nothing.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
    @job_options
    def command(config: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
        run_stages(stages, config, dry_run, as_json, given(options))

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

    from autodeco.registry import Registry
    from autodeco.settings import resolve

    registry = Registry()
    resolved = resolve(options, config, registry)
    if dry_run:
        _print_job(resolved, as_json)
        return
    from autodeco.pipeline import run_job

    console = Console(stderr=as_json)
    summary = run_job(
        resolved.job,
        registry=registry,
        stages=stages,
        console=console,
        provenance=resolved.provenance,
    )
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=2))
        return
    if summary.evaluation is not None:
        console.print(summary.evaluation)
    console.print(summary.table())


def _print_job(resolved: Any, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    values = resolved.job.to_json()
    if as_json:
        origins = dict(resolved.provenance)
        click.echo(json.dumps({"job": values, "provenance": origins}, indent=2))
        return
    table = Table("option", "value", "from", title="the job; nothing is run", title_justify="left")
    for name, value in values.items():
        table.add_row(name, str(value), resolved.provenance[name])
    Console().print(table)
