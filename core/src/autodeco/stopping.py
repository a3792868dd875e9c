"""Ending early: at a signal, or when the time limit comes near."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType
from typing import Any

from autodeco.errors import Interrupted, StoppedEarly, UsageError
from autodeco.processes import seconds_since_start

_NUMBER = r"([0-9]{1,12})"
_DURATION = re.compile(rf"(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s?)?")
_UNITS = (86400, 3600, 60, 1)


class Stop(IntEnum):
    """Why a run ends early; of what several ranks say, the largest counts."""

    NO = 0
    EARLY = 1
    INTERRUPTED = 2


def parse_duration(text: str) -> float:
    """Returns the seconds of 3h50m, 90m, 1d, 45s or 5400.

    Raises:
        UsageError: It is none of these, or zero.
    """
    match = _DURATION.fullmatch(text.strip())
    numbers = [int(part or 0) for part in match.groups()] if match else [0]
    seconds = float(sum(n * unit for n, unit in zip(numbers, _UNITS, strict=False)))
    if not seconds:
        raise UsageError(
            f"{text!r} is no duration", where="time_limit", fix="write 3h50m, 90m or seconds"
        )
    return seconds


@contextmanager
def stop_at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `StoppedEarly`: for stages that are done whole or not at all."""

    def stop(number: int, _: Any) -> None:
        raise StoppedEarly(f"{signal.Signals(number).name} came")

    with _handled((signal.SIGTERM, signal.SIGUSR1), stop):
        yield


@contextmanager
def signals_ignored() -> Iterator[None]:
    """SIGTERM and SIGUSR1 do nothing: for the moments in which a run finds out why it ends."""
    with _handled((signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN):
        yield


class StopWatch:
    """Tells a loop when to write a checkpoint and end.

    Within its context SIGTERM, SIGUSR1 and SIGINT are requests; a second SIGINT ends at once.

    Args:
        limit: A duration from the start of the process, None for no limit.
    """

    def __init__(self, limit: str | None) -> None:
        self._limit = parse_duration(limit) if limit is not None else None
        self._asked = Stop.NO
        self._slowest: Counter[str] = Counter()
        self._signals = _handled((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), self._ask)

    def __enter__(self) -> StopWatch:
        self._signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.__exit__(None, None, None)

    def _ask(self, number: int, _: Any) -> None:
        interrupt = number == signal.SIGINT
        if interrupt and self._asked == Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self._asked = max(self._asked, Stop.INTERRUPTED if interrupt else Stop.EARLY)
        os.write(2, b"\nstopping after this step, with a checkpoint\n")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Notes how long a step, an evaluation or a checkpoint takes."""
        began = time.monotonic()
        yield
        self._slowest[what] = max(self._slowest[what], time.monotonic() - began)  # type: ignore[assignment]

    def wanted(self) -> Stop:
        """Returns whether to end now: asked, or another step would not fit the time limit."""
        if self._asked or self._limit is None:
            return self._asked
        # the next step, its evaluation and its checkpoint, after the checkpoint that is due now
        room = sum(self._slowest.values()) + self._slowest["checkpoint"]
        return Stop.EARLY if seconds_since_start() + room > self._limit else Stop.NO


def end_early(stop: Stop, what: str) -> None:
    """Ends the run if that is wanted, on all ranks alike.

    Raises:
        StoppedEarly: At a signal or the time limit.
        KeyboardInterrupt: At Ctrl-C.
    """
    if stop == Stop.INTERRUPTED:
        raise Interrupted
    if stop == Stop.EARLY:
        raise StoppedEarly(what, agreed=True)


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    """Handles signals within; only the main thread can, elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
