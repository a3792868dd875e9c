"""How far an evaluation is: a bar on a terminal, elsewhere one plain line now and then."""

from __future__ import annotations

import time

from rich.console import Console

from autodeco.progress import TerminalBar


class AnswersLine(TerminalBar):
    """Counts answers; give `update` to `sample_answers` or `evaluate`.

    Args:
        console: where to.
        seconds: without a terminal, the time between two lines.
    """

    def __init__(self, console: Console, seconds: float) -> None:
        super().__init__(console, "answers", None)
        self._console, self._seconds = console, seconds
        self._began = self._last = time.monotonic()
        self._first: int | None = None

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` answers are there."""
        if self.shown(completed=done, total=total):
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._began, self._last = done, now, now
        elif now - self._last >= self._seconds:
            self._last, new = now, done - self._first
            left = f", about {(now - self._began) / new * (total - done):.0f} s left" if new else ""
            self._console.print(
                f"  {done:,}/{total:,} answers after {now - self._began:.0f} s{left}",
                highlight=False,
            )
