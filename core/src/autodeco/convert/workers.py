"""Runs many small pieces of a conversion in threads, a few at a time, and shows how far it is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn

from autodeco.progress import TerminalBar

#: A piece of work; returns the bytes that it has dealt with.
Task = Callable[[], int]
# one more for each that waits for the disk; beyond, they only wait for each other
_MOST_WORKERS = 8
_SECONDS = 30.0


def default_workers() -> int:
    """Returns how many threads keep both the processors and the disk busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_WORKERS, (cores or 1) + 1)


def run_tasks(tasks: Iterable[Task], workers: int, progress: BytesProgress | None = None) -> None:
    """Runs tasks, begun in their order; at most twice as many as workers are taken from `tasks`.

    Args:
        tasks: Made one after the other, as they are needed.
        workers: Threads; torch uses one processor in each of them.
        progress: Is told the bytes.

    Raises:
        BaseException: That of the first task that fails; those that have not begun are not.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    pending: set[Future[int]] = set()

    def settle(most: int) -> None:
        nonlocal pending
        while len(pending) > most:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                size = future.result()
                if progress is not None:
                    progress.advance(size)

    try:
        for task in tasks:
            pending.add(pool.submit(task))
            settle(2 * workers)
        settle(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


class BytesProgress(TerminalBar):
    """A bar on a terminal; elsewhere a plain line now and then. Use it in a ``with`` block.

    Args:
        console: Where to.
        what: What is done: "cast".
        total: Bytes.
        done: Of these, at the beginning.
        seconds: Between two plain lines.
    """

    def __init__(
        self, console: Console, what: str, total: int, done: int = 0, seconds: float = _SECONDS
    ) -> None:
        counts = (DownloadColumn(binary_units=True), TransferSpeedColumn())
        super().__init__(console, what, total, done, counts)
        self._console, self._what, self._seconds = console, what, seconds
        self._total, self._done, self._first = total, done, done
        self._began = self._last = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, size: int) -> None:
        """Counts `size` more bytes; threads may."""
        with self._lock:
            self._show(size)

    def _show(self, size: int) -> None:
        self._done += size
        if self.shown(completed=self._done):
            return
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        speed = (self._done - self._first) / (now - self._began)
        left = (self._total - self._done) / speed if speed else 0.0
        self._console.print(
            f"  {self._what}: {self._done / 2**30:,.1f} of {self._total / 2**30:,.1f} GiB, "
            f"{speed / 2**20:,.0f} MiB/s, about {left:,.0f} s left",
            highlight=False,
        )


class MemoryGate:
    """Lets threads hold so many bytes together; who alone needs more, waits until it is alone.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        """Waits until `size` more bytes may be held; whoever waits must hold none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def release(self, size: int) -> None:
        """Gives them back."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()
