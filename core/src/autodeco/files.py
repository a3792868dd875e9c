"""Durable writes: everything is written beside its final name, synced, and renamed.

A reader therefore sees the old content, the new content, or nothing; a kill or a full disk at any
point leaves at most a temporary file, whose name begins with a dot and ends in ``.partial``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from autodeco.errors import EnvironmentProblem, UsageError, WeightsError
from autodeco.foreign import plain_json

PARTIAL_SUFFIX = ".partial"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name


def write_problem(error: OSError, path: Path, what: str = "write") -> EnvironmentProblem:
    """Returns the error for a user: what could not be done, where, and what to do."""
    fixes = {
        errno.ENOSPC: "free some space, or choose another directory with --out; then run again",
        errno.EDQUOT: "your quota is used up: free some space, then run again",
        errno.EACCES: "make the directory writable, or choose another with --out",
        errno.EPERM: "make the directory writable, or choose another with --out",
        errno.EROFS: "the filesystem is read-only: choose another directory with --out",
    }
    return EnvironmentProblem(
        f"cannot {what}: {error.strerror or error}",
        where=str(path),
        fix=fixes.get(error.errno or 0, "check the disk, then run the same command again"),
    )


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that nothing has, and that `remove_partial` knows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> Path:
    """Creates a directory and its parents.

    Raises:
        EnvironmentProblem: The directory cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_problem(error, path) from error
    return path


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file's content in one step.

    Raises:
        EnvironmentProblem: The file cannot be written; the old content is intact.
    """
    with atomic_file(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a stream whose content becomes that of `path` when the block ends well.

    Raises:
        EnvironmentProblem: The file cannot be written; the old content is intact.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_problem(error, path) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8) in one step; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step; see `atomic_write_bytes`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def atomic_directory(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that becomes `final` when the block ends well.

    Args:
        final: The directory to appear; it must not exist unless `replace`.
        replace: Put the new directory in the place of an existing one.

    Raises:
        UsageError: `final` exists and `replace` is False.
        EnvironmentProblem: It cannot be written.
    """
    if final.exists() and not replace:
        raise UsageError(
            "the output directory exists already",
            where=str(final),
            fix="choose another output, or remove it first",
        )
    temporary = temporary_name(final)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        if final.exists():
            retired = temporary_name(final)
            final.rename(retired)
            try:
                temporary.rename(final)
            except OSError:
                retired.rename(final)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.rename(final)
        sync(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise write_problem(error, final) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(prepared: Path, final: Path) -> None:
    """Gives a complete directory, made by several processes or runs, its name in one step.

    Raises:
        EnvironmentProblem: It cannot be synced or renamed, or `final` exists.
    """
    try:
        sync_tree(prepared)
        prepared.rename(final)
        sync(final.parent)
    except OSError as error:
        raise write_problem(error, final) from error


def sync_tree(directory: Path) -> None:
    """Flushes every directory and every new file below `directory` to the disk.

    A file with several hard links was there before: what flushes it is not who links it.
    """
    for root, _, names in os.walk(directory):
        for name in names:
            path = Path(root, name)
            if path.lstat().st_nlink == 1:
                sync(path)
        sync(Path(root))


def remove_partial(directory: Path) -> list[Path]:
    """Removes what earlier, killed writers left in `directory`; returns what was removed.

    What cannot be removed now (a reader may hold it on a network filesystem) is left for later.
    """
    removed = []
    for path in directory.glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(EnvironmentProblem):
            _delete(path)
            removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there; a directory disappears in one step.

    Raises:
        EnvironmentProblem: It cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            retired = temporary_name(path)
            path.rename(retired)
            path = retired
    except OSError as error:
        raise write_problem(error, path, "remove") from error
    _delete(path)


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise write_problem(error, path, "remove") from error


def fetch_hint(model: Path) -> str | None:
    """Returns what to do about a model that is not there and whose name is one of the hub's."""
    if model.exists() or not _HUB_ID.fullmatch(str(model)):
        return None
    return (
        f"if it is a model of the hub, run `autodeco fetch {model}` and give the directory that "
        "it prints; else check the path"
    )


def read_json(path: Path, *, who: str | None = None) -> Any:
    """Reads a JSON file.

    Raises:
        WeightsError: The file is missing, unreadable or malformed; the message has the line.
    """
    try:
        return plain_json(path)
    except FileNotFoundError as error:
        raise WeightsError(
            "the file is missing",
            who=who,
            where=str(path),
            fix=fetch_hint(path.parent) or "check the path",
        ) from error
    except json.JSONDecodeError as error:
        raise WeightsError(
            f"malformed JSON: {error.msg}",
            who=who,
            where=f"{path}:{error.lineno}:{error.colno}",
            fix="the file is damaged or was cut short: fetch or write it again",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: also a number of 5,000 digits
        raise WeightsError(
            f"cannot read: {error}", who=who, where=str(path), fix="check the file"
        ) from error


def read_object(path: Path, *, who: str | None = None) -> dict[str, Any]:
    """Reads a JSON file that holds an object; raises as `read_json`, also if it holds none."""
    value = read_json(path, who=who)
    if not isinstance(value, dict):
        raise WeightsError(
            f"the file holds a {type(value).__name__}, not an object",
            who=who,
            where=str(path),
            fix="use the file that came with the others, or fetch it again",
        )
    return value
