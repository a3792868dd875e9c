"""``doctor``: what is installed here; with ``--distributed``, whether a job's ranks agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autodeco.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodeco.doctor.report import Row


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="runs",
    show_default=True,
    help="Where runs will be written: its disk and filesystem are tried.",
)
@click.option(
    "--distributed",
    is_flag=True,
    help="Under the job's own torchrun line: try its processes, network and layout.",
)
@click.option("--plugin", help="Plugin whose random preset is computed. [--distributed]")
@click.option("--preset", help="Preset of the job, for its layout. [--distributed]")
@click.option("--layout", help="The job's layout, as tp=2,pp=2. [--distributed]")
@click.option("--device", help="cpu, cuda or cuda:N; default: auto. [--distributed]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    help="Seconds until all ranks must have come; default: 30. [--distributed]",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    help="Seconds for everything; default: 80. [--distributed]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(out: Path, distributed: bool, as_json: bool, **options: str | float | None) -> None:
    """Report what is installed, what this machine can do, and how to cure each problem.

    The exit code is 7 when something is missing that is needed.

    Example: autodeco doctor --out runs

    Example: autodeco doctor --distributed --plugin FAMILY --layout tp=2
    """
    given = {name: value for name, value in options.items() if value is not None}
    if distributed:
        from autodeco.doctor.distributed import Request, examine_together

        request = Request(out=out, **given)  # type: ignore[arg-type]
        code = examine_together(request, lambda rows: _print(rows, as_json, "all ranks"))
    else:
        if given:
            raise UsageError(
                f"--{next(iter(given))} has no effect without --distributed",
                fix="add --distributed under the job's torchrun line, or leave it out",
            )
        from autodeco.doctor.probes import examine, probes
        from autodeco.doctor.report import exit_code

        rows = examine(probes(out))
        _print(rows, as_json, "this machine")
        code = exit_code(rows)
    if code:
        sys.exit(code)


def _print(rows: Sequence[Row], as_json: bool, title: str) -> None:
    from autodeco.doctor.report import table, to_json

    if as_json:
        click.echo(json.dumps(to_json(rows), indent=2))
        return
    from rich.console import Console

    Console().print(table(rows, f"autodeco doctor: {title}"))
