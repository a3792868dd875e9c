"""Long work shows how far it is: a bar on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


class TerminalBar:
    """A rich bar where the console is a terminal, and nothing elsewhere.

    Args:
        console: Where it is drawn.
        description: Before the bar.
        total: Of what is counted; None: not known yet.
        done: Of that, at the beginning.
        counts: What stands behind the bar; default: done and total.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        total: int | None,
        done: int = 0,
        counts: Sequence[ProgressColumn] = (),
    ) -> None:
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                *(counts or (TextColumn("{task.completed}/{task.total}"),)),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(description, total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def shown(self, **values: Any) -> bool:
        """Moves the bar (completed, total, description); returns whether there is one."""
        if self._bar is None:
            return False
        self._bar.update(self._task, **values)
        return True
