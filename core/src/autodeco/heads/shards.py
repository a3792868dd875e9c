"""Safetensors shards: tensors by name, and renaming without touching the data."""

from __future__ import annotations

import base64
import json
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from autodeco.copying import Advance, write_file
from autodeco.errors import WeightsError
from autodeco.safetensors_header import Header, parse_header, read_header, read_whole_header

Rename = Callable[[str], str | None]
_ALIGN = 8
_BLOCK = 4096  # data that begins at the same place of a block can be shared, where a filesystem can
_METADATA = "__metadata__"
# Of a renamed shard: its header before, where giving the names back would not give its bytes back.
_HEADER_BEFORE = "autodeco.header_before"
_LONGEST_HEADER = 100_000_000
_THREADS = 4


def read_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Reads the named tensors alone.

    Raises:
        WeightsError: The file is damaged or lacks one of them.
    """
    missing = set(names) - set(read_header(file))
    try:
        if missing:
            raise SafetensorError(f"it has no tensor {min(missing)!r}")
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"cannot read the tensors: {error}",
            where=str(file),
            fix="the file is damaged or was changed: fetch or write it again",
        ) from error


@dataclass(frozen=True)
class RenamedShard:
    """A shard that is to be written under other names; see `rename_shard`.

    Attributes:
        source: The shard as it is.
        target: The file to be written.
        header: Its first bytes, the length of the JSON included.
        ranges: (first byte, bytes) in `source` of what follows, in this order.
    """

    source: Path
    target: Path
    header: bytes
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Returns the bytes of the file."""
        return len(self.header) + sum(size for _, size in self.ranges)

    def write(self, advance: Advance) -> int:
        """Writes it, block by block; raises as `autodeco.copying.write_file` does."""
        with self.source.open("rb") as reader:
            descriptor = reader.fileno()
            ranges = [(descriptor, first, size) for first, size in self.ranges]
            return write_file(self.target, self.header, ranges, advance)


def rename_shard(source: Path, target: Path, rename: Rename, back: Rename) -> RenamedShard:
    """Plans a shard under other names; nothing is written.

    Args:
        source: A safetensors file.
        target: To be written.
        rename: The new name, or None to leave the tensor out.
        back: The inverse of `rename`. Where it would not restore the header byte by byte (another
            writer's spacing), the new header carries the old one with it, and `restore_shard`
            gives that back.

    Raises:
        WeightsError: The file is missing, truncated or malformed.
    """
    old = read_whole_header(source)
    content, ranges = _renamed(old, rename)
    whole = len(content) == len(old.content())
    twice = _HEADER_BEFORE in content.get(_METADATA, {})
    if whole and (twice or _renamed_content(content, back) != old.raw):
        packed = base64.b64encode(zlib.compress(old.raw)).decode()
        # the old one has no room of its own: it stands among what is free to anyone
        content = {_METADATA: {**content.pop(_METADATA, {}), _HEADER_BEFORE: packed}, **content}
    room = (old.start - len(_packed(content))) % _BLOCK
    return RenamedShard(source, target, _packed(content, room - room % _ALIGN), ranges)


def restore_shard(source: Path, target: Path, back: Rename) -> RenamedShard:
    """Plans what `rename_shard` made a shard from, byte by byte; nothing is written.

    Raises:
        WeightsError: The file is missing, truncated or malformed, or the header that it carries is
            not that of its data.
    """
    old = read_whole_header(source)
    content, ranges = _renamed(old, back)
    metadata = content.get(_METADATA, {})
    if _HEADER_BEFORE not in metadata:
        return RenamedShard(source, target, _packed(content), ranges)
    size = sum(size for _, size in ranges)
    raw = _unpacked(source, metadata[_HEADER_BEFORE])
    text = _json(content)
    now = parse_header(source, text, 8 + len(text) + size)
    try:
        before = parse_header(source, raw, 8 + len(raw) + size)
    except WeightsError as error:
        raise _foreign_header(source) from error
    if _places(before) != _places(now):
        raise _foreign_header(source)
    return RenamedShard(source, target, struct.pack("<Q", len(raw)) + raw, ranges)


def _places(header: Header) -> dict[str, tuple[Any, ...]]:
    return {
        name: (info.dtype, info.shape, info.start - header.start, info.size)
        for name, info in header.tensors.items()
    }


def _foreign_header(source: Path) -> WeightsError:
    return WeightsError(
        f"the header of the base that {_HEADER_BEFORE} carries is not that of this file's data",
        where=str(source),
        fix="the file is damaged or was edited: merge again",
    )


def _unpacked(source: Path, packed: str) -> bytes:
    try:
        unpacking = zlib.decompressobj()
        raw = unpacking.decompress(base64.b64decode(packed, validate=True), _LONGEST_HEADER)
    except (ValueError, zlib.error) as error:
        raise _foreign_header(source) from error
    if not unpacking.eof:
        raise _foreign_header(source)
    return raw


def _renamed(old: Header, rename: Rename) -> tuple[dict[str, Any], tuple[tuple[int, int], ...]]:
    """The parsed header under other names, and the ranges of the file that are kept."""
    content, kept, ranges, end = old.content(), {}, list[tuple[int, int]](), 0
    for name, info in sorted(old.tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if rename(name) is None:
            continue
        kept[name] = [end, end + info.size]
        end += info.size
        if ranges and sum(ranges[-1]) == info.start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + info.size)
        else:
            ranges.append((info.start, info.size))
    new: dict[str, Any] = {}
    for name, entry in content.items():
        renamed = name if name == _METADATA else rename(name)
        if renamed in new:
            raise WeightsError(
                f"two tensors would be named {renamed!r}",
                where=str(next(iter(old.tensors.values())).file),
                fix="the checkpoint is damaged: fetch it again",
            )
        if renamed is not None:
            new[renamed] = entry if name == _METADATA else {**entry, "data_offsets": kept[name]}
    return new, tuple(ranges)


def _renamed_content(content: dict[str, Any], rename: Rename) -> bytes:
    names = {name: name if name == _METADATA else rename(name) for name in content}
    return _json({str(names[name]): entry for name, entry in content.items()})


def _json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % _ALIGN)


def _packed(content: dict[str, Any], room: int = 0) -> bytes:
    text = _json(content) + b" " * room
    return struct.pack("<Q", len(text)) + text


class _Stopped(Exception):
    """Another shard failed, or the process is to end."""


def in_threads(tasks: Sequence[Callable[[Advance], int]], advance: Advance) -> list[int]:
    """Runs tasks that write files, four at a time; the first failure stops the others.

    Args:
        tasks: Each takes what it tells its progress, and returns the bytes that it wrote.
        advance: Is told the bytes of all, by one thread at a time.

    Returns:
        The bytes of each.

    Raises:
        BaseException: That of the first task that failed.
    """
    stop, lock = threading.Event(), threading.Lock()

    def tell(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            advance(size)

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(task, tell) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [f for f in done if f.exception() is not None]
        finally:
            stop.set()  # all are done, one has failed, or a signal came
            for future in futures:
                future.cancel()
    for future in failed:
        if not isinstance(future.exception(), _Stopped):
            future.result()
    return [future.result() for future in futures]
