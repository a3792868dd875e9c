"""Durable writes: everything is written beside its final name, synced, and renamed.

A reader therefore sees the old content, the new content, or nothing; a kill or a full disk at any
point leaves at most a temporary file, whose name begins with a dot and ends in ``.partial``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from autodeco.errors import EnvironmentProblem, UsageError, WeightsError
from autodeco.foreign import plain_json

PARTIAL_SUFFIX = ".partial"
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of a file


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
    """Flushes every file and directory below `directory` to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
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


def link_or_copy(source: Path, target: Path) -> Literal["hardlink", "reflink", "copy"]:
    """Gives `target` the content of `source`, sharing its blocks where the filesystem can.

    Symbolic links are resolved first (hub caches are full of them).

    Returns:
        How it was done: a hard link, a reflink (copy on write), or a full copy.

    Raises:
        EnvironmentProblem: None of the three worked.
    """
    source = source.resolve()
    with contextlib.suppress(OSError):
        os.link(source, target)
        return "hardlink"
    if reflink(source, target):
        return "reflink"
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise write_problem(error, target) from error
    return "copy"


def reflink(source: Path, target: Path) -> bool:
    """Makes `target` a copy on write of `source`; returns whether the filesystem can."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        return False
    try:
        with source.open("rb") as reader, target.open("xb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def read_json(path: Path, *, who: str | None = None) -> Any:
    """Reads a JSON file.

    Raises:
        WeightsError: The file is missing, unreadable or malformed; the message has the line.
    """
    try:
        return plain_json(path)
    except FileNotFoundError as error:
        raise WeightsError(
            "the file is missing", who=who, where=str(path), fix="check the path"
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
