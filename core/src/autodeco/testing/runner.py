"""Runs checks on a plugin and reports what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autodeco.errors import AutodecoError, EnvironmentProblem
from autodeco.testing.checks import CHECKS, Check, CheckFailed, NotRun

if TYPE_CHECKING:
    from rich.table import Table

    from autodeco.testing.context import Context

PASSED = "passed"
FAILED = "failed"
NOT_RUN = "not run"
_COLOURS = {PASSED: "green", FAILED: "red", NOT_RUN: "yellow"}


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        check: The check.
        state: `PASSED`, `FAILED` or `NOT_RUN`.
        found: What was measured, or why it failed or was not run.
        where: Where it failed.
        fix: What to do.
        seconds: What it took.
        excused: It was not run, and nothing is missing.
        exit_code: Of the error.
    """

    check: Check
    state: str
    found: str
    where: str | None = None
    fix: str | None = None
    seconds: float = 0.0
    excused: bool = False
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome for scripts."""
        return {
            "check": self.check.name,
            "level": self.check.level,
            "proves": self.check.proves,
            "state": self.state,
            "found": self.found,
            "where": self.where,
            "fix": self.fix,
            "seconds": round(self.seconds, 2),
            "excused": self.excused,
        }


def perform(check: Check, context: Context) -> str:
    """Makes one check.

    Returns:
        What was measured.

    Raises:
        CheckFailed: The plugin fails, by whatever error; it names plugin, place and cure.
        NotRun: It cannot be made here.
    """
    try:
        return check.run(context)
    except NotRun as error:
        error.who = error.who or context.who
        raise
    except AutodecoError as error:
        failure = CheckFailed(
            error.what,
            who=context.who,
            where=error.where,
            fix=error.fix or f"autodeco --debug plugin check {context.family.id} shows more",
        )
        raise failure from error
    except Exception as error:  # a stranger's data may break anything on its way
        raise CheckFailed(
            f"{type(error).__name__}: {str(error).strip() or 'no message'}",
            who=context.who,
            where=f"check {check.name}",
            fix="correct what the message names in the plugin's data; if it is the kit that is "
            "wrong, report it with the traceback of --debug",
        ) from error


def run_checks(
    context: Context,
    checks: Sequence[Check] = CHECKS,
    *,
    debug: bool = False,
    told: Callable[[Check], None] = lambda check: None,
) -> tuple[Outcome, ...]:
    """Makes checks in their order; what needs one that failed is not run.

    Args:
        context: The plugin.
        checks: Some of `CHECKS`.
        debug: An error that is no finding of a check is raised.
        told: Called before each.
    """
    outcomes: dict[str, Outcome] = {}
    for check in checks:
        told(check)
        begin = time.monotonic()
        without = [n for n in check.needs if n in outcomes and outcomes[n].state != PASSED]
        if without:
            outcome = Outcome(
                check, NOT_RUN, f"it says nothing without {without[0]}", fix="see there"
            )
        else:
            outcome = _outcome(check, context, begin, debug)
        outcomes[check.name] = outcome
    return tuple(outcomes.values())


def _outcome(check: Check, context: Context, begin: float, debug: bool) -> Outcome:
    try:
        found = perform(check, context)
    except (CheckFailed, NotRun) as error:
        if debug and not isinstance(error.__cause__, AutodecoError | None):
            raise
        not_run = isinstance(error, NotRun)
        return Outcome(
            check,
            NOT_RUN if not_run else FAILED,
            error.what,
            error.where,
            error.fix,
            time.monotonic() - begin,
            isinstance(error, NotRun) and error.excused,
            error.exit_code,
        )
    return Outcome(check, PASSED, found, seconds=time.monotonic() - begin)


def exit_code(outcomes: Sequence[Outcome], *, allow_not_run: bool = False) -> int:
    """Returns 0 when all passed, 3 when one failed, 7 when one was not run without an excuse."""
    if any(outcome.state == FAILED for outcome in outcomes):
        return CheckFailed.exit_code
    missing = any(o.state == NOT_RUN and not o.excused for o in outcomes)
    return EnvironmentProblem.exit_code if missing and not allow_not_run else 0


def table(outcomes: Sequence[Outcome], title: str) -> Table:
    """Returns the report for people; what to do stands below what failed."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("check", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    shown.add_column("found", overflow="fold")
    shown.add_column("s", justify="right", no_wrap=True)
    for outcome in outcomes:
        found = escape(outcome.found)
        if outcome.where:
            found += f"\n[bold]where:[/] {escape(outcome.where)}"
        if outcome.fix and outcome.state != PASSED:
            found += f"\n[bold]do:[/] {escape(outcome.fix)}"
        state = f"[{_COLOURS[outcome.state]}]{outcome.state}[/]"
        shown.add_row(outcome.check.name, state, found, f"{outcome.seconds:.1f}")
    return shown
