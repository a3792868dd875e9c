"""Reads tensors, or blocks of them, from a torch.distributed.checkpoint directory.

Needs neither megatron-core nor the process that wrote it, and unpickles nothing: a record is an
archive of torch.save, whose one storage is read as bytes once its description has been checked.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zipfile
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from autodeco.convert.direct_reader import read_into
from autodeco.convert.inert_pickle import Global, Inert, read_pickle
from autodeco.convert.operations import Region
from autodeco.convert.torch_dist_metadata import (
    ITEM_BYTES,
    Dims,
    StoredChunk,
    StoredTensorInfo,
    TorchDistMetadata,
)
from autodeco.errors import WeightsError

_NAME_LENGTHS = 26  # where a zip entry's own header has the lengths of its name and extra field
_LONGEST_DESCRIPTION = 64 << 10
_BLOCK = 8 << 20
_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
# what describes a tensor in its record; dtypes without a storage class of their own come by name
_REBUILD, _REBUILD_NAMED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = frozenset(
    {
        *(_REBUILD, _REBUILD_NAMED, _PARAMETER, "collections.OrderedDict"),
        *(f"torch.{name}" for name in (*_STORAGES, *ITEM_BYTES)),
        *("torch.storage.UntypedStorage", "torch.UntypedStorage"),
    }
)


class TorchDistReader:
    """An open checkpoint; use it in a ``with`` block. Threads may share it.

    Args:
        directory: The one with ``.metadata``.

    Raises:
        WeightsError: ``.metadata`` is missing, damaged or forged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata = TorchDistMetadata(directory)
        self._infos: dict[str, StoredTensorInfo] = {}
        self._by_rows: dict[str, dict[tuple[int, int], list[StoredChunk]]] = {}
        self._starts: dict[tuple[str, StoredChunk], int] = {}
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def info(self, key: str) -> StoredTensorInfo:
        """Returns where a tensor is.

        Raises:
            WeightsError: There is none of this name, or its chunks do not make it up.
        """
        if key not in self._infos:
            self._infos[key] = self.metadata.tensor(key)
        return self._infos[key]

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """Returns a block of a tensor; of its bytes, no others are read.

        Args:
            key: One of the metadata's.
            region: Start and stop in each dimension; None: all of it.

        Raises:
            WeightsError: There is no such tensor or block, or a record of it is cut short, damaged
                or not what the metadata says.
        """
        info = self.info(key)
        region = region if region is not None else tuple((0, size) for size in info.shape)
        inside = len(region) == len(info.shape) and all(
            0 <= a <= b <= size for (a, b), size in zip(region, info.shape, strict=True)
        )
        if not inside:
            raise WeightsError(
                f"{key!r} of {info.shape} has no block {region}",
                where=str(self.directory),
                fix="the checkpoint is of a model of another shape: check --plugin and --preset",
            )
        taken = self._taken(info, region)
        starts = [self._start(info, chunk) for chunk in taken]  # before memory is asked for
        result = torch.empty([b - a for a, b in region], dtype=getattr(torch, info.dtype))
        raw = result.reshape(-1).view(torch.uint8).numpy()
        raw = raw.reshape(*(result.shape or (1,)), info.itemsize)
        for chunk, start in zip(taken, starts, strict=True):
            self._copy(info, chunk, start, region, raw)
        return result

    def _taken(self, info: StoredTensorInfo, region: Region) -> list[StoredChunk]:
        """Finds the chunks of a region; a tensor of all layers and experts has thousands."""
        if info.key not in self._by_rows:
            groups: dict[tuple[int, int], list[StoredChunk]] = {}
            for chunk in info.chunks:
                start, rows = (chunk.offset or (0,))[0], (chunk.shape or (1,))[0]
                groups.setdefault((start, start + rows), []).append(chunk)
            self._by_rows[info.key] = groups
        first, last = region[0] if region else (0, 1)
        groups = self._by_rows[info.key]
        near = (c for (a, b), cs in groups.items() if a < last and first < b for c in cs)
        return [chunk for chunk in near if _within(chunk, region) is not None]

    def _copy(
        self, info: StoredTensorInfo, chunk: StoredChunk, start: int, region: Region, raw: Any
    ) -> None:
        """Copies what a chunk has of a region; `raw` is the region's bytes."""
        common = _within(chunk, region)
        assert common is not None
        chunk_shape, offset = chunk.shape or (1,), chunk.offset or (0,)
        common, region = common or ((0, 1),), region or ((0, 1),)  # a scalar is one element
        places = zip(common, region, strict=True)
        target = raw[tuple(slice(a - first, b - first) for (a, b), (first, _) in places)]
        mine = tuple((a - o, b - o) for (a, b), o in zip(common, offset, strict=True))
        # from `outer` on, what is wanted lies in one piece for each place in the dimensions before
        outer = len(mine) - 1
        while outer and mine[outer] == (0, chunk_shape[outer]):
            outer -= 1
        strides = [prod(chunk_shape[d + 1 :]) * info.itemsize for d in range(len(mine))]
        for place in np.ndindex(*target.shape[:outer]):
            first = sum((m[0] + p) * s for m, p, s in zip(mine, place, strides, strict=False))
            first += mine[outer][0] * strides[outer]
            self._copy_rows(chunk, start + first, target[place])

    def _copy_rows(self, chunk: StoredChunk, position: int, target: Any) -> None:
        """Fills an array from consecutive bytes; rows that lie apart in memory go by a buffer."""
        while len(target) == 1 and target.ndim > 2:
            target = target[0]
        row = target[0].size
        step = max(_BLOCK // row, 1)
        for at in range(0, len(target), step):
            rows = target[at : at + step]
            if rows.flags.c_contiguous:
                self._fill(chunk, position, rows.reshape(-1).data)
            else:
                buffer = np.empty(rows.shape, dtype=np.uint8)
                self._fill(chunk, position, buffer.reshape(-1).data)
                rows[...] = buffer
            position += rows.size

    def _fill(self, chunk: StoredChunk, position: int, view: memoryview) -> None:
        path = self.directory / chunk.file
        try:
            read_into(self._descriptor(chunk.file), position, view)
        except EOFError as error:
            raise _cut_short(path, "the file ends within a tensor") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def _descriptor(self, file: str) -> int:
        with self._opening:
            if file not in self._descriptors:
                path = self.directory / file
                try:
                    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
                    self._descriptors[file] = os.open(path, flags)
                except FileNotFoundError as error:
                    raise _cut_short(path, "the file is missing") from error
                except OSError as error:
                    raise _unreadable(path, error) from error
            return self._descriptors[file]

    def _start(self, info: StoredTensorInfo, chunk: StoredChunk) -> int:
        """Returns where a chunk's elements begin in its file; checks its record."""
        record = (info.dtype, chunk)
        if record not in self._starts:
            path = self.directory / chunk.file
            descriptor = self._descriptor(chunk.file)
            size = os.fstat(descriptor).st_size
            if chunk.at + chunk.length > size:
                what = f"the file has {size} bytes, and {info.key!r} goes on to "
                raise _cut_short(path, what + f"{chunk.at + chunk.length}")
            window = _Window(descriptor, chunk.at, chunk.length)
            try:
                self._starts[record] = _locate(window, info, chunk)
            except OSError as error:
                raise _unreadable(path, error) from error
            except (ValueError, KeyError, IndexError, zipfile.BadZipFile, struct.error,
                    NotImplementedError, RuntimeError, EOFError) as error:  # fmt: skip
                what = f"the record of {info.key!r} is damaged: {error}"
                raise _cut_short(path, what) from error
        return self._starts[record]


def _cut_short(path: Path, what: str) -> WeightsError:
    fix = "it was cut short, changed or forged: fetch or write the checkpoint again"
    return WeightsError(what, where=str(path), fix=fix)


def _unreadable(path: Path, error: OSError) -> WeightsError:
    what, fix = f"cannot read: {error.strerror or error}", "check the disk, then run it again"
    return WeightsError(what, where=str(path), fix=fix)


def _within(chunk: StoredChunk, region: Region) -> Region | None:
    """Returns what chunk and region have in common, in the tensor's coordinates."""
    found = tuple(
        (max(a, o), min(b, o + n))
        for (a, b), o, n in zip(region, chunk.offset, chunk.shape, strict=True)
    )
    return found if all(a < b for a, b in found) else None


def _locate(window: _Window, info: StoredTensorInfo, chunk: StoredChunk) -> int:
    """Finds the elements of a tensor in its record.

    Raises:
        ValueError: The record is no archive of this one tensor.
    """
    with zipfile.ZipFile(cast(BinaryIO, window)) as archive:
        entries = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        if [name for name in entries if name.startswith("data/")] != ["data/0"]:
            raise ValueError("it is no archive of one tensor")
        storage, description = entries["data/0"], entries["data.pkl"]
        if description.file_size > _LONGEST_DESCRIPTION:
            raise ValueError("its description is too long")
        if {storage.compress_type, description.compress_type} != {zipfile.ZIP_STORED}:
            raise ValueError("it is compressed")
        order = entries.get("byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise ValueError("its bytes are in another order")
        _check_described(archive.read(description), info, chunk)
    size = prod(chunk.shape) * info.itemsize
    if storage.file_size != size:
        raise ValueError(f"it has {storage.file_size} bytes, expected {size}")
    window.seek(storage.header_offset + _NAME_LENGTHS)
    name, extra = struct.unpack("<HH", window.read(4))
    start: int = storage.header_offset + _NAME_LENGTHS + 4 + name + extra
    if start + size > chunk.length:
        raise ValueError("its elements reach beyond it")
    return chunk.at + start


def _check_described(pickled: bytes, info: StoredTensorInfo, chunk: StoredChunk) -> None:
    """Checks that a record's description is that of a plain tensor of the metadata's kind."""
    tensor = read_pickle(pickled, _ALLOWED, f"{chunk.file}, the record of {info.key!r}")
    if isinstance(tensor, Inert) and tensor.name == _PARAMETER:
        tensor = tensor.args[0]
    if not isinstance(tensor, Inert) or tensor.name not in (_REBUILD, _REBUILD_NAMED):
        raise ValueError("it holds no plain tensor")
    storage, offset, shape, strides = tensor.args[:4]
    kind = storage.args[0][1] if isinstance(storage, Inert) else None
    if tensor.name == _REBUILD_NAMED:
        kind = tensor.args[6]
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    dtype = _STORAGES.get(name, name)
    if dtype != info.dtype:
        raise ValueError(f"it is of the dtype {dtype[:40]!r}, expected {info.dtype!r}")
    plain: Dims = tuple(n for n in shape if n != 1)
    if plain != tuple(n for n in chunk.shape if n != 1):
        raise ValueError(f"it has not the shape {chunk.shape}")
    packed = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    loose = any(s != p for n, s, p in zip(shape, strides, packed, strict=True) if n != 1)
    if offset != 0 or (loose and prod(shape)):
        raise ValueError("its elements do not lie one after the other")


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own; only what is asked for is read."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError("before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        """Returns the position."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Reads up to the window's end."""
        left = max(self._size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._descriptor, wanted, self._start + self._at)
        self._at += len(data)
        return data
