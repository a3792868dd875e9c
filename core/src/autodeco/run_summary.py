"""What a run did, for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        path: The run directory.
        rows: Stage, what it made, seconds.
        results: The evaluation's result as JSON, or None.
        evaluation: A renderable table of it, or None.
    """

    path: Path
    rows: tuple[tuple[str, str, float], ...]
    results: Mapping[str, Any] | None = None
    evaluation: Any = None

    def to_json(self) -> dict[str, Any]:
        """Returns the summary for scripts."""
        stages = [{"stage": s, "made": m, "seconds": round(t, 3)} for s, m, t in self.rows]
        return {"run": str(self.path), "stages": stages, "evaluation": self.results}

    def table(self) -> Table:
        """Returns the summary for people."""
        table = Table(title=escape(f"run {self.path}"), title_justify="left")
        table.add_column("stage")
        table.add_column("made", overflow="fold")
        table.add_column("seconds", justify="right")
        for stage, made, seconds in self.rows:
            table.add_row(stage, escape(made), f"{seconds:.1f}")
        return table
