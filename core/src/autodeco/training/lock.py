"""A lock on a run directory; the system frees it when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from autodeco.errors import EnvironmentProblem, RunError
from autodeco.files import write_problem

LOCK_FILE = "lock"


@dataclass(frozen=True)
class RunLock:
    """A held lock.

    Attributes:
        stream: The open file; closing it frees the lock.
    """

    stream: TextIO

    def release(self) -> None:
        """Frees the lock."""
        self.stream.close()


def run_lock(directory: Path) -> RunLock:
    """Takes the lock of a run directory.

    Raises:
        RunError: Another process has it; the message names it.
        EnvironmentProblem: The lock file cannot be opened or written.
    """
    path = directory / LOCK_FILE
    try:
        stream = path.open("a+")
    except OSError as error:
        raise write_problem(error, path, "lock the run") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        holder = _describe(stream.read())
        stream.close()
        raise RunError(
            f"the run is in use by {holder}",
            where=str(directory),
            fix="wait for it, stop it, or begin another run with --resume new",
        ) from error
    except OSError as error:
        stream.close()
        raise EnvironmentProblem(
            f"the filesystem cannot lock the run: {error.strerror}",
            where=str(path),
            fix="choose a directory on a filesystem with file locks, with --out",
        ) from error
    now = datetime.now(UTC).isoformat(timespec="seconds")
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    try:
        stream.truncate(0)
        stream.write(json.dumps(mine))
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # closing tries to write once more
            stream.close()
        raise write_problem(error, path) from error
    return RunLock(stream)


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        return "another process"
