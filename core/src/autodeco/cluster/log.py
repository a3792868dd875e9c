"""``logs/rank-<n>.log``: what each rank did and what went wrong there, one flushed line each."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autodeco.errors import AutodecoError, StoppedEarly
from autodeco.files import make_directory, write_problem

LOGS = "logs"
# Where nobody listens, nothing goes to the console: what people shall see is printed.
_LOGGER = logging.getLogger("autodeco")
_LOGGER.addHandler(logging.NullHandler())


class _OneLine(logging.Formatter):
    """A record on one line, its traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        return " | ".join(line for line in super().format(record).splitlines() if line.strip())


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short without ending the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing: the run's own next write reports the disk."""

    def close(self) -> None:
        """Closes the file, whatever the disk says."""
        with suppress(OSError):
            super().close()


@contextmanager
def rank_log(directory: Path, rank: int, device: str) -> Iterator[logging.Logger]:
    """Writes this rank's log for as long as the context lasts.

    It has our own lines, every library's and Python's warnings, and the error that ends the run.
    What goes to the console stays as it is.

    Args:
        directory: The run directory.
        rank: This process's.
        device: This process's.

    Raises:
        EnvironmentProblem: The log cannot be written.
    """
    path = make_directory(directory / LOGS) / f"rank-{rank}.log"
    try:
        handler = _LogFile(path, encoding="utf-8")  # flushes after every record
    except OSError as error:
        raise write_problem(error, path) from error
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with _attached(handler), _warnings_logged():
        host, pid = socket.gethostname(), os.getpid()
        _LOGGER.info("begin: rank %d, host %s, pid %d, device %s", rank, host, pid, device)
        try:
            yield _LOGGER
        except (KeyboardInterrupt, StoppedEarly) as stopped:
            _LOGGER.warning("stopped: %s", str(stopped) or "interrupted")
            raise
        except AutodecoError as error:
            _LOGGER.error("%s", error, exc_info=True)
            raise
        except BaseException:
            _LOGGER.exception("a defect of autodeco, or an end from outside")
            raise
        else:
            _LOGGER.info("end")


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Attaches the file, and keeps on the console what Python itself would have put there."""
    root = logging.getLogger()
    apart = [log for log in map(logging.getLogger, ("transformers",)) if not log.propagate]
    added = [(log, handler) for log in (root, *apart)]
    if not root.handlers:
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        console.addFilter(lambda record: record.name.split(".")[0] != _LOGGER.name)
        added.append((root, console))
    level = _LOGGER.level
    for log, one in added:
        log.addHandler(one)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)
        for log, one in added:
            log.removeHandler(one)
        handler.close()


@contextmanager
def _warnings_logged() -> Iterator[None]:
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        _LOGGER.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        shown(message, category, filename, lineno, *more)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown


def in_one_line(error: BaseException) -> str:
    """Returns an error in one line, for the other ranks."""
    kind = "" if isinstance(error, AutodecoError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())
