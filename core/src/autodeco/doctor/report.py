"""What a check found, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autodeco.errors import EnvironmentProblem

if TYPE_CHECKING:
    from rich.table import Table

OK = "ok"
MISSING = "missing (optional)"
PROBLEM = "problem"
_COLOURS = {OK: "green", MISSING: "dim", PROBLEM: "red"}


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: What was looked at.
        found: What is there.
        state: `OK`, `MISSING` or `PROBLEM`.
        cure: The command or step that cures a problem, or brings what is missing.
        needed: Whether nothing works well without it: its problems decide the exit code.
    """

    name: str
    found: str
    state: str = OK
    cure: str | None = None
    needed: bool = False

    @property
    def stops(self) -> bool:
        """Returns whether this alone makes the exit code 7."""
        return self.needed and self.state == PROBLEM

    def to_json(self) -> dict[str, Any]:
        """Returns the row for scripts."""
        return {
            "name": self.name,
            "found": self.found,
            "state": self.state,
            "cure": self.cure,
            "needed": self.needed,
        }


def exit_code(rows: Sequence[Row]) -> int:
    """Returns 0 when nothing that is needed is missing, else 7."""
    return EnvironmentProblem.exit_code if any(row.stops for row in rows) else 0


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the report for scripts."""
    return {"ok": exit_code(rows) == 0, "rows": [row.to_json() for row in rows]}


def table(rows: Sequence[Row], title: str) -> Table:
    """Returns the report for people; the cures stand below what they cure."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    shown.add_column("name")
    shown.add_column("found", overflow="fold")
    shown.add_column("state")
    for row in rows:
        state = f"{row.state}, needed" if row.stops else row.state
        found = escape(row.found)
        if row.cure and row.state != OK:
            found += f"\n[bold]do:[/] {escape(row.cure)}"
        shown.add_row(escape(row.name), found, f"[{_COLOURS[row.state]}]{state}[/]")
    return shown
