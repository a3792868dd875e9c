"""Writes a safetensors file of which everything but the tensors' bytes is known beforehand.

The bytes may come in any order, from several threads; the file appears under its name when all of
them are there and on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from autodeco.errors import WeightsError
from autodeco.files import sync, temporary_name, write_problem
from autodeco.safetensors_header import DTYPE_BYTES

Dims = tuple[int, ...]
_ALIGN = 8  # of the header's length, as the safetensors library writes it
# the writeback of what lies behind is begun in such steps, so that the last fsync has little to do
_WRITEBACK = 64 << 20


class Buffer(Protocol):
    """Anything with the buffer protocol: bytes, a memoryview, a numpy array."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """Returns a view of the bytes."""
        ...


@dataclass(frozen=True)
class Span:
    """Bytes of a file: where they begin, and how many there are."""

    start: int
    size: int


@dataclass(frozen=True)
class ShardPlan:
    """A file to be written.

    Attributes:
        header: Its first bytes, the length of the JSON included.
        tensors: Name -> where its bytes go in the file.
        size: Of the whole file.
    """

    header: bytes
    tensors: Mapping[str, Span]
    size: int


def plan_shard(
    tensors: Iterable[tuple[str, str, Dims]], metadata: Mapping[str, str] | None = None
) -> ShardPlan:
    """Lays out a file.

    Args:
        tensors: Name, dtype (safetensors' name) and shape of each, in the order of the file.
        metadata: For the header's ``__metadata__``; transformers wants ``{"format": "pt"}``, which
            is the default.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        spans[name] = (end, size)
        end += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    header = struct.pack("<Q", len(text)) + text
    places = {name: Span(len(header) + start, size) for name, (start, size) in spans.items()}
    return ShardPlan(header, places, len(header) + end)


def index_of(shards: Mapping[str, ShardPlan]) -> dict[str, Any]:
    """Returns the content of a checkpoint's index, from the plans of its files."""
    size = sum(span.size for plan in shards.values() for span in plan.tensors.values())
    table = {name: file for file, plan in shards.items() for name in plan.tensors}
    return {"metadata": {"total_size": size}, "weight_map": table}


def is_whole(path: Path, plan: ShardPlan) -> bool:
    """Whether a file of this plan is there; one under its own name was whole when it got it."""
    if not path.is_file() or path.stat().st_size != plan.size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(plan.header)) == plan.header


class ShardWriter:
    """An open file that is being written; use it in a ``with`` block.

    Args:
        path: The file to appear.
        plan: What it is made of.

    Raises:
        EnvironmentProblem: It cannot be written; nothing appears.
        WeightsError: The block ends well, and not every byte was written.
    """

    def __init__(self, path: Path, plan: ShardPlan) -> None:
        self.path, self.plan = path, plan
        self._temporary = temporary_name(path)
        self._written: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._descriptor = -1
        self._behind = 0

    def __enter__(self) -> ShardWriter:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(self._temporary, flags, 0o666)
            self._put(self.plan.header, 0)
        except OSError as error:
            self._discard()
            raise write_problem(error, self.path) from error
        return self

    def write(self, name: str, at: int, buffer: Buffer) -> None:
        """Writes bytes of a tensor, each of them once.

        Args:
            name: One of the plan's tensors.
            at: Where they go, counted from the tensor's first byte.
            buffer: The bytes.

        Raises:
            EnvironmentProblem: They cannot be written.
            WeightsError: They reach beyond the tensor.
        """
        view, span = memoryview(buffer).cast("B"), self.plan.tensors[name]
        if at < 0 or at + len(view) > span.size:
            raise WeightsError(
                f"bytes {at} to {at + len(view)} of {name!r} lie outside it ({span.size} bytes)",
                where=str(self.path),
                fix="report this: the plan of the file and what fills it do not agree",
            )
        try:
            self._put(view, span.start + at)
        except OSError as error:
            raise write_problem(error, self.path) from error
        with self._lock:
            self._written[name] += len(view)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        lacking = [n for n, s in self.plan.tensors.items() if self._written[n] != s.size]
        if lacking:
            self._discard()
            raise WeightsError(
                f"{len(lacking)} tensors were not written whole, the first is {lacking[0]!r}",
                where=str(self.path),
                fix="report this: the plan of the file and what fills it do not agree",
            )
        try:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._temporary.replace(self.path)
            sync(self.path.parent)
        except OSError as error:
            self._discard()
            raise write_problem(error, self.path) from error

    def _put(self, data: Buffer, position: int) -> None:
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(self._descriptor, view, position)
            view, position = view[count:], position + count
        if position - self._behind >= _WRITEBACK:
            self._write_back(position)

    def _write_back(self, position: int) -> None:
        """Asks the kernel to write what lies behind; it drops from its cache what is written."""
        with self._lock:
            start, self._behind = self._behind, position
        if hasattr(os, "posix_fadvise") and position > start:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, start, position - start, os.POSIX_FADV_DONTNEED)

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
