"""Runs of the command line on several gloo ranks of this machine, for tests of whole jobs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS = 240


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class Ranks:
    """Processes of one `autodeco` command, started without torchrun, which would end them all."""

    def __init__(self, arguments: Sequence[str], world: int) -> None:
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if world > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
            shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "autodeco", *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else shared,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def send_when(self, ready: Callable[[], bool], rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank as soon as `ready` says so; it must not have ended before."""
        until, process = time.monotonic() + SECONDS, self.processes[rank]
        while not ready():
            assert time.monotonic() < until
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(number)

    def ended(self, rank: int) -> tuple[int, str]:
        """Waits for a rank; returns its exit code and what it said."""
        _, said = self.processes[rank].communicate(timeout=SECONDS)
        return self.processes[rank].returncode, said

    def all_ended(self) -> list[tuple[int, str]]:
        """The same of every rank."""
        return [self.ended(rank) for rank in range(len(self.processes))]


def run_well(arguments: Sequence[str], world: int) -> None:
    """Runs a command on some ranks, all of which must end with 0."""
    with Ranks(arguments, world) as ranks:
        ended = ranks.all_ended()
    assert [code for code, _ in ended] == [0] * world, ended


def only_run(out: Path) -> Path:
    """The one run directory below `out`."""
    (job,) = out.glob("*/*/job.json")
    return job.parent


def metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in `metrics.jsonl` of the one run below `out`."""
    lines = (only_run(out) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]
