"""Gives a file's content another name or place, sharing its blocks where the filesystem can.

A hard link and a reflink write nothing. Every other way writes all bytes, a copy that the kernel or
a file server makes by itself as well, and is taken only where the user asked for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from autodeco.errors import EnvironmentProblem
from autodeco.files import PARTIAL_SUFFIX, temporary_name, write_problem

_PROBE = "autodeco-link"
_NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
Advance = Callable[[int], None]
_PIECE = 32 << 20  # a piece is what a stop waits for
_BUFFER = 4 << 20
_BLOCK = 4096
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of a file
# Of copy_file_range: the kernel or one of the two filesystems has no such call.
_NO_RANGES = (
    errno.EXDEV,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
)


def nothing(size: int) -> None:
    """Takes the bytes of a copy, and does nothing with them."""


def share_file(source: Path, target: Path) -> Literal["hardlink", "reflink"] | None:
    """Gives `target` the content of `source` without writing any.

    Symbolic links are resolved first (hub caches are full of them).

    Returns:
        How it was done: a hard link or a reflink (copy on write); None: the filesystem can neither.

    Raises:
        EnvironmentProblem: It could, were it not full or read-only.
    """
    source = source.resolve()
    try:
        os.link(source, target)
        return "hardlink"
    except OSError as error:
        problem = error
    if reflink(source, target):
        return "reflink"
    if problem.errno in _NOT_WRITABLE:
        raise write_problem(problem, target) from problem
    return None


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
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        return False
    return True


def require_sharing(sources: Iterable[Path], directory: Path, fix: str) -> None:
    """Checks that files can be shared with a directory, by trying it; leaves nothing.

    One file of each filesystem and owner is tried: the numbers of devices do not tell (bind mounts
    refuse links within one, and who does not own a file may not link it).

    Args:
        sources: The files.
        directory: Where they are to appear; it need not exist yet.
        fix: What to do instead.

    Raises:
        EnvironmentProblem: One cannot; nothing was written.
    """
    place = directory.absolute()
    while not place.is_dir():
        place = place.parent
    for left in place.glob(f".{_PROBE}.*{PARTIAL_SUFFIX}"):  # of a process that was killed here
        with contextlib.suppress(OSError):
            left.unlink()
    files = [source.resolve() for source in sources]
    size = sum(file.stat().st_size for file in files)
    tried = set()
    for file in files:
        status = file.stat()
        kind = (file.parent, status.st_dev, status.st_uid, status.st_mode)
        if kind in tried:
            continue
        tried.add(kind)
        probe = temporary_name(place / _PROBE)
        why = ""
        try:
            os.link(file, probe)
        except OSError as error:
            if error.errno in _NOT_WRITABLE:
                raise write_problem(error, directory) from error
            why = error.strerror or str(error)
        shared = not why or reflink(file, probe)
        with contextlib.suppress(OSError):  # the next probe here removes it
            probe.unlink(missing_ok=True)
        if not shared:
            raise EnvironmentProblem(
                f"the weights in {file.parent} cannot be linked into {place} ({why}); to copy them "
                f"would write {size:,} bytes ({size / 2**30:,.2f} GiB): nothing was written",
                where=str(directory),
                fix=fix,
            )


def copy_file(source: Path, target: Path, advance: Advance = nothing) -> int:
    """Copies a file; it is on the disk when this returns.

    Args:
        source: The file; a symbolic link is resolved.
        target: To be written; it must not exist.
        advance: Is told the bytes of each piece; it may raise to stop.

    Returns:
        The bytes written.

    Raises:
        EnvironmentProblem: It cannot be written.
    """
    with source.open("rb") as reader:
        size = os.fstat(reader.fileno()).st_size
        write_file(target, b"", [(reader.fileno(), 0, size)], advance)
    return size


def write_file(
    target: Path,
    begin: bytes,
    ranges: Iterable[tuple[int, int, int]],
    advance: Advance = nothing,
) -> int:
    """Writes a new file: some bytes, then ranges of open files; it is on the disk at the end.

    Args:
        target: To be written; it must not exist.
        begin: Its first bytes.
        ranges: (descriptor, first byte, bytes) of each range.
        advance: Is told the bytes of each piece; it may raise to stop.

    Returns:
        The bytes written. Memory stays below 8 MiB.

    Raises:
        EnvironmentProblem: It cannot be written, or a range is not there.
    """
    ranges = list(ranges)
    total = len(begin) + sum(size for _, _, size in ranges)
    try:
        with target.open("xb", buffering=0) as writer:
            descriptor = writer.fileno()
            _put(descriptor, begin, 0)
            position = len(begin)
            for source, first, size in ranges:
                _copy_range(source, first, descriptor, position, size, advance)
                position += size
            os.fsync(descriptor)
    except OSError as error:
        raise write_problem(error, target) from error
    return total


def _copy_range(
    source: int, first: int, target: int, position: int, size: int, advance: Advance
) -> None:
    """Copies a range; in the kernel, or by the file server, where they can."""
    in_kernel = hasattr(os, "copy_file_range")
    while size:
        done = 0
        if in_kernel:
            try:
                # filesystems with reflinks share whole blocks: all but what is before the first
                count = min(size, -first % _BLOCK or _PIECE)
                done = os.copy_file_range(source, target, count, first, position)
            except OSError as error:
                if error.errno not in _NO_RANGES:
                    raise
                in_kernel = False
        if not in_kernel:
            block = os.pread(source, min(size, _BUFFER), first)
            _put(target, block, position)
            done = len(block)
        if not done:
            raise OSError(errno.EIO, "the file that is copied was cut short")
        first, position, size = first + done, position + done, size - done
        advance(done)


def _put(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, position)
        view, position = view[done:], position + done
