"""Locks between processes; the system frees them when their holder ends, however it ends."""

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
class FileLock:
    """A held lock.

    Attributes:
        stream: The open file; closing it frees the lock.
        path: Its name.
    """

    stream: TextIO
    path: Path

    def release(self) -> None:
        """Frees the lock."""
        self.stream.close()

    def remove(self) -> None:
        """Removes the file, if that is possible, and frees the lock."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.stream.close()


def run_lock(directory: Path) -> FileLock:
    """Takes the lock of a run directory; raises as `file_lock` does."""
    fix = "wait for it, stop it, or begin another run with --resume new"
    return file_lock(directory / LOCK_FILE, "the run", directory, fix)


def output_lock(output: Path, what: str) -> FileLock:
    """Takes the lock of a directory that is to appear; the lock lies beside it.

    Raises: as `file_lock` does.
    """
    fix = "wait for it, or choose another directory"
    return file_lock(_beside(output), what, output, fix)


def forget_output_lock(output: Path) -> None:
    """Removes the lock that a process left which was killed when `output` was complete."""
    with contextlib.suppress(OSError):
        _beside(output).unlink(missing_ok=True)


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def file_lock(path: Path, what: str, where: Path, fix: str) -> FileLock:
    """Takes a lock, or says who has it.

    Args:
        path: The file of the lock, with the last holder's name in it.
        what: What the lock is on, for messages.
        where: Where that is.
        fix: What who does not get it should do.

    Raises:
        RunError: Another process has it; the message names it.
        EnvironmentProblem: The lock file cannot be opened or written.
    """
    try:
        stream = path.open("a+")
    except OSError as error:
        raise write_problem(error, path, f"lock {what}") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.seek(0)
        holder = _describe(stream.read())
        stream.close()
        raise RunError(
            f"{what} is in use by {holder}",
            where=str(where),
            fix=fix,
        ) from error
    except OSError as error:
        stream.close()
        raise EnvironmentProblem(
            f"the filesystem cannot lock {what}: {error.strerror}",
            where=str(path),
            fix="choose a directory on a filesystem with file locks, with --out",
        ) from error
    if not path.exists() or not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
        stream.close()  # the holder removed it just now; the next one has another file
        return file_lock(path, what, where, fix)
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
    return FileLock(stream, path)


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        return "another process"
