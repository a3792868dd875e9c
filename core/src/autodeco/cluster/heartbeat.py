"""Signs of life between the ranks: who died, hangs or failed is named, and nobody waits for it.

Collectives cannot do that: NCCL's never return when a peer is gone, gloo's name an address at best.
So each rank has a thread that puts a sign of life in the store of torchrun's rendezvous, and looks
for those of the others. The threads run on when the main thread waits in a collective.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from autodeco.cluster.log import in_one_line

_LOGGER = logging.getLogger("autodeco.cluster")
_VERDICT = "verdict"
_FINISHED = "finished"
GO_ON = "run the same command again; it goes on from the last checkpoint"
_FAILED = 7  # EnvironmentProblem's exit code


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    Attributes:
        code: The exit code.
        text: What happened, with rank and host.
    """

    code: int
    text: str


@dataclass
class _Sign:
    """The last sign of life of a rank: what it said, and when it was new."""

    text: str
    since: float

    @property
    def finished(self) -> bool:
        return self.text == _FINISHED


class Heartbeat:
    """This rank's signs of life, and its watch over the others.

    Rank 0 watches all, the others watch rank 0. Whoever finds a rank silent writes a verdict to
    the store; every rank that reads one ends its process, after a moment in which the main thread
    may do so itself.

    Args:
        store: A store of its own: its operations wait for the server.
        rank: This process's.
        hosts: The host of each rank.
        seconds: A rank that is silent for so long is taken for dead.
    """

    def __init__(self, store: Any, rank: int, hosts: Sequence[str], seconds: float) -> None:
        self._store, self._rank, self._hosts, self._seconds = store, rank, tuple(hosts), seconds
        self._interval = min(2.0, seconds / 8)
        self._watched = [r for r in (range(len(hosts)) if rank == 0 else [0]) if r != rank]
        self._signs: dict[int, _Sign] = {}
        self._answered = time.monotonic()
        self._verdict: Verdict | None = None
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins to give signs and to watch."""
        for body in (self._talk, self._watch):
            name = f"autodeco-{body.__name__}"
            self._threads.append(threading.Thread(target=body, daemon=True, name=name))
            self._threads[-1].start()

    def finish(self) -> None:
        """Says that this rank is done: its silence means nothing from now on."""
        self._stopped.set()
        self._quietly(lambda: self._store.set(f"sign/{self._rank}", _FINISHED))
        for thread in self._threads:
            if thread is not threading.current_thread():
                # Python aborts at its end when a thread is still within the store.
                thread.join(self._interval + 1)

    def post(self, code: int, text: str) -> None:
        """Tells the others that this rank ends, and why; an earlier verdict stays."""
        verdict = json.dumps([code, f"{self.name(self._rank)}: {text}"])
        self._quietly(lambda: self._store.compare_set(_VERDICT, "", verdict))
        self.finish()

    def name(self, rank: int) -> str:
        """Returns how a rank is named to people."""
        return f"rank {rank} on host {self._hosts[rank]}"

    def blame(self, error: BaseException) -> Verdict:
        """Finds out, after a collective failed here, which rank is the cause."""
        before = time.monotonic()
        while self._verdict is None and time.monotonic() < before + 2 * self._interval:
            time.sleep(0.05)  # if the store answers, it has done so by then
        found = self._verdict
        if found is None:
            found = Verdict(_FAILED, self._cause(before, error))
            self._quietly(
                lambda: self._store.compare_set(_VERDICT, "", json.dumps([found.code, found.text]))
            )
        self.finish()
        return found

    def _cause(self, before: float, error: BaseException) -> str:
        if self._answered < before:
            return f"{self.name(0)}, or the store of the rendezvous there, does not answer"
        signs = {r: self._read_sign(r) for r in range(len(self._hosts)) if r != self._rank}
        time.sleep(2 * self._interval + 0.5)  # a live rank gives a sign in this time
        later = {rank: self._read_sign(rank) for rank in signs}
        silent = [r for r, s in signs.items() if s == later[r] and s != _FINISHED]
        if silent:
            return ", ".join(map(self.name, silent)) + " died or was stopped: no sign of life"
        busy = [
            f"{self.name(r)} (at {s['at']})"
            for r, s in ((r, json.loads(t)) for r, t in later.items() if t and t != _FINISHED)
            if not s["waits"]
        ]
        if busy:
            return "the others waited too long for " + ", ".join(busy)
        return f"the ranks lost each other: {in_one_line(error)}"

    def _talk(self) -> None:
        """Gives signs and reads those of the others, as long as the store answers."""
        count = 0
        while True:
            count += 1
            at, waits = _place(self._main)
            try:
                if not self._stopped.is_set():
                    sign = json.dumps({"count": count, "at": at, "waits": waits})
                    self._store.set(f"sign/{self._rank}", sign)
                self._verdict = self._read_verdict()
                for rank in self._watched:
                    self._note(rank, self._read_sign(rank))
                self._answered = time.monotonic()
            except RuntimeError:
                pass  # the server is gone or does not answer: `_watch` sees to it
            if self._verdict is not None:
                self._end(self._verdict)
            if self._stopped.wait(self._interval):
                return

    def _watch(self) -> None:
        """Ends the process when a rank, or the store, is silent for too long."""
        last = time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if now - last > 4 * self._interval + 1:  # this process itself was stopped for a while
                self._answered = now
                for sign in self._signs.values():
                    sign.since = now
            last = now
            silent = [
                r
                for r, sign in dict(self._signs).items()
                if not sign.finished and now - sign.since > self._seconds
            ]
            what = f" gave no sign of life for {self._seconds:g} s: it died, or its host hangs"
            if now - self._answered > self._seconds:
                self._end(Verdict(_FAILED, self.name(0) + what), told=False)
            elif silent:
                verdict = Verdict(_FAILED, ", ".join(map(self.name, silent)) + what)
                text = json.dumps([verdict.code, verdict.text])
                self._quietly(lambda text=text: self._store.compare_set(_VERDICT, "", text))
                self._end(verdict, told=False)

    def _note(self, rank: int, text: str) -> None:
        known = self._signs.get(rank)
        if known is None or known.text != text:
            self._signs[rank] = _Sign(text, time.monotonic())

    def _read_sign(self, rank: int) -> str:
        key = f"sign/{rank}"
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def _read_verdict(self) -> Verdict | None:
        try:
            if self._store.check([_VERDICT]):
                return Verdict(*json.loads(self._store.get(_VERDICT)))
        except RuntimeError:
            pass
        return None

    def _quietly(self, call: Any) -> None:
        """Calls the store, but waits for an answer only a moment."""

        def body() -> None:
            try:
                call()
            except RuntimeError:
                _LOGGER.info("the store of the rendezvous does not answer")

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(self._interval)

    def _end(self, verdict: Verdict, *, told: bool = True) -> None:
        """Ends this process, whose main thread may hang in a collective for ever."""
        if told and self._stopped.wait(self._interval + 1):
            return  # the main thread is at it
        _LOGGER.error("%s", verdict.text)
        if self._rank == 0 or not told:
            kind = "stopped" if verdict.code == 75 else "error"
            os.write(2, f"{kind}: {verdict.text}\n  do: {GO_ON}\n".encode())
        sys.stdout.flush()
        os._exit(verdict.code)


def _place(thread: int | None) -> tuple[str, bool]:
    """Returns where the main thread is in our code, and whether it waits for other ranks."""
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    waits = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        waits = waits or "torch/distributed" in path.as_posix()
        if "autodeco" in path.parts:
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "the start", waits
