"""``plugin check``: the conformance kit on an installed plugin."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autodeco.errors import UsageError
from autodeco.testing.checks import CHECKS, check_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodeco.testing.checks import Check
    from autodeco.testing.runner import Outcome


@click.command("check")
@click.argument("name")
@click.option(
    "--index",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="model.safetensors.index.json of a published checkpoint: its names must all be known.",
)
@click.option("--preset", help="The preset that --index is of; default: the one that it fits.")
@click.option(
    "--only",
    metavar="CHECK",
    multiple=True,
    help="Make this check alone; may be repeated. Checks: "
    + ", ".join(check.name for check in CHECKS)
    + ".",
)
@click.option("--quick", is_flag=True, help="Leave out the checks that take minutes.")
@click.option(
    "--allow-not-run",
    is_flag=True,
    help="Exit with 0 although a check could not be made here (an engine is missing).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check_plugin(
    context: click.Context,
    name: str,
    index: Path | None,
    preset: str | None,
    only: tuple[str, ...],
    quick: bool,
    allow_not_run: bool,
    as_json: bool,
) -> None:
    """Check a plugin: its data, weight map, engines and heads, in the order of what they cost.

    The exit code is 0 when every check passed, 3 when one failed, and 7 when one could not be made.

    Example: autodeco plugin check FAMILY

    Example: autodeco plugin check FAMILY --index model.safetensors.index.json --only index
    """
    if preset and not index:
        raise UsageError(
            "--preset says what --index is of, and there is no --index",
            fix="add --index FILE, or leave --preset out",
        )
    from autodeco.registry import Registry

    row = Registry().get(name)
    checks = tuple(map(check_named, only)) or tuple(c for c in CHECKS if not (quick and c.costly))
    debug = bool((context.find_root().obj or {}).get("debug"))
    from autodeco.testing.context import Context
    from autodeco.testing.runner import exit_code, run_checks

    with tempfile.TemporaryDirectory(prefix="autodeco-check-") as work:
        table = {preset or "": index} if index else {}
        outcomes = run_checks(
            Context(row, Path(work), index=table), checks, debug=debug, told=_tell
        )
    _print(outcomes, as_json, f"{row.who}: {len(outcomes)} of {len(CHECKS)} checks")
    code = exit_code(outcomes, allow_not_run=allow_not_run)
    if code:
        sys.exit(code)


def _tell(check: Check) -> None:
    if sys.stderr.isatty():
        click.echo(f"{check.name}: {check.proves} ...", err=True)


def _print(outcomes: Sequence[Outcome], as_json: bool, title: str) -> None:
    from autodeco.testing.runner import FAILED, NOT_RUN, table

    if as_json:
        states = [outcome.state for outcome in outcomes]
        document = {
            "ok": FAILED not in states,
            "complete": NOT_RUN not in states,
            "checks": [outcome.to_json() for outcome in outcomes],
        }
        click.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console

    Console().print(table(outcomes, title))
