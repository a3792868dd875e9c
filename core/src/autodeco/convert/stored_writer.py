"""Writes pieces in torch.distributed.checkpoint's format, one tensor at a time, and its metadata.

A file of that format is records of ``torch.save``, one behind the other; which ones, and what they
make up together, only ``.metadata`` says. So files can be written by any rank, thread, or run.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from autodeco.convert.direct_reader import TORCH_DTYPES, DirectReader
from autodeco.convert.operations import read_target
from autodeco.convert.stored import Part, Piece, WrittenFile, WrittenPiece, file_crc32
from autodeco.convert.workers import MemoryGate
from autodeco.errors import WeightsError
from autodeco.files import atomic_file, atomic_write_json, write_problem
from autodeco.hookspecs import ImportedWeights
from autodeco.weights import BoundRule

_DTYPES = ("F32", "F16", "BF16")
_NAME_LENGTHS = 26  # where a zip entry's own header has the lengths of its name and extra field
# megatron-core's CheckpointingConfig, as its save_config writes it
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class SourceTargets:
    """The targets of a weight map, read from the source checkpoint.

    Args:
        weights: The source, in Hugging Face format.
        reader: It, open; threads share it.
        gate: Holds the bytes of the targets that are in memory.
    """

    def __init__(self, weights: ImportedWeights, reader: DirectReader, gate: MemoryGate) -> None:
        self.shape, self.reader, self.gate = weights.shape, reader, gate
        self.rules = {rule.target: rule for rule in weights.weight_map.rules}

    def dtype(self, piece: Piece) -> torch.dtype:
        """Returns the dtype of a piece, which is that of its sources.

        Raises:
            WeightsError: They differ, or it is none that megatron-core stores.
        """
        sources = self.rules[piece.target].sources
        kinds = {self.reader.tensors[name].dtype for name in sources}
        if len(kinds) > 1 or not kinds <= set(_DTYPES):
            raise WeightsError(
                f"the tensors are stored as {', '.join(sorted(kinds))}",
                where=", ".join(sources),
                fix="import a checkpoint in one of " + ", ".join(_DTYPES),
            )
        return TORCH_DTYPES[kinds.pop()]

    def held(self, rule: BoundRule) -> int:
        """Returns the most bytes that reading a target takes: it, and the largest of its parts."""
        sizes = [
            prod(part.size) * TORCH_DTYPES[self.reader.tensors[part.source].dtype].itemsize
            for part in rule.parts
        ]
        tensors = [self.reader.tensors[name] for name in rule.sources]
        as_it_is = all(t.format is None for t in tensors) and len(sizes) == 1
        alone = as_it_is and not (rule.parts[0].transposed or rule.rule.interleaved)
        return sizes[0] if alone else sum(sizes) + max(sizes)


class PieceSource:
    """Makes pieces, in the order of their targets, for one thread; use it in a ``with`` block.

    Args:
        targets: Where they come from.
    """

    def __init__(self, targets: SourceTargets) -> None:
        self._targets = targets
        self._last: tuple[str, Tensor] | None = None
        self._held = 0

    def __enter__(self) -> PieceSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def read(self, piece: Piece) -> Tensor:
        """Returns a piece, of a storage of its own; the target is kept until another is read."""
        if self._last is None or self._last[0] != piece.target:
            self._let_go()
            rule = self._targets.rules[piece.target]
            self._held = self._targets.held(rule)
            self._targets.gate.acquire(self._held)
            target = read_target(rule, self._targets.shape, self._targets.reader).contiguous()
            self._last = (piece.target, target)
        rows = self._last[1][piece.first_row : piece.first_row + piece.shape[0]]
        # torch.save writes a tensor's whole storage: this one shares the bytes, and has no others
        raw = torch.from_numpy(rows.view(-1).view(torch.uint8).numpy())
        return raw.view(rows.dtype).view(piece.stored_shape)

    def _let_go(self) -> None:
        self._last = None
        self._targets.gate.release(self._held)
        self._held = 0


def part_file(number: int) -> str:
    """Returns the name of a file of pieces, as torch's own writer names those of a rank."""
    return f"__{number}_0.distcp"


def write_part(
    directory: Path,
    number: int,
    pieces: Sequence[Piece],
    targets: SourceTargets,
    blob: str | None,
    written: Callable[[int], object] = lambda size: None,
) -> Part:
    """Writes one file of pieces.

    Args:
        directory: ``weights/``.
        number: Of the part; its file is named after it.
        pieces: What goes into it.
        targets: Where they come from.
        blob: Write an empty object as well.
        written: Is told the bytes of each piece.

    Raises:
        EnvironmentProblem: The file cannot be written.
        WeightsError: The source cannot be read.
    """
    path = directory / part_file(number)
    records: list[tuple[int, int, str]] = []
    at: tuple[int, int] | None = None
    with atomic_file(path) as stream, PieceSource(targets) as source:
        summed = _SummedStream(stream)
        for piece in pieces:
            tensor = source.read(piece)
            raw = tensor.view(-1).view(torch.uint8).numpy().data
            digest = hashlib.sha256(raw).hexdigest()
            size = len(raw)
            records.append((*_save(tensor, summed), digest))
            del tensor, raw  # before the next is read
            written(size)
        if blob is not None:
            # what megatron-core stores for a module without an extra state
            at = _save([None], summed)
    content = WrittenFile(summed.size, summed.crc32)
    with path.open("rb") as reading:
        found = tuple(
            _located(reading, piece, targets.dtype(piece), path.name, *record)
            for piece, record in zip(pieces, records, strict=True)
        )
    return Part(path.name, content, found, at)


def _save(value: object, stream: _SummedStream) -> tuple[int, int]:
    """Appends a record; returns where it is, and its length."""
    start = stream.size
    try:
        torch.save(value, cast(BinaryIO, stream))
    except RuntimeError as error:
        if stream.problem is None:
            raise
        raise stream.problem from error  # torch.save hides a full disk
    return start, stream.size - start


def finish(directory: Path, parts: Iterable[Part], objects: Sequence[str]) -> dict[str, Any]:
    """Writes what makes a checkpoint of the parts; returns the small files, by name.

    Args:
        directory: ``weights/``.
        parts: All of them.
        objects: Keys of the (empty) objects that megatron-core asks for.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    results: list[WriteResult] = []
    for part in parts:
        for written in part.pieces:
            piece, record = written.piece, _StorageInfo(part.file, written.at, written.length)
            chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.stored_shape))
            properties = TensorProperties(dtype=getattr(torch, written.dtype))
            for key in (piece.key, *piece.aliases):
                size = torch.Size(piece.global_shape)
                tensors.setdefault(key, TensorStorageMetadata(properties, size, []))
                tensors[key].chunks.append(chunk)
                index = MetadataIndex(key, chunk.offsets)
                results.append(WriteResult(index, written.size, record))
        if part.blob is not None:
            blob = _StorageInfo(part.file, *part.blob)
            results += [WriteResult(MetadataIndex(key), blob.length, blob) for key in objects]
    metadata = Metadata({**tensors, **{key: BytesStorageMetadata() for key in objects}})
    try:
        _NoPathsWriter(directory).finish(metadata, [results])
    except OSError as error:
        raise write_problem(error, directory / ".metadata") from error
    with atomic_file(directory / "common.pt") as stream:
        torch.save({}, stream)
    atomic_write_json(directory / "metadata.json", _CONFIG)
    names = (".metadata", "common.pt", "metadata.json")
    paths = [directory / name for name in names]
    return {p.name: WrittenFile(p.stat().st_size, file_crc32(p)) for p in paths}


class _NoPathsWriter(FileSystemWriter):
    def storage_meta(self) -> None:
        """Keeps this machine's path out of the file."""
        return


class _SummedStream(io.RawIOBase):
    """Passes on what is written and sums it up; whoever opened the stream closes it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = self.crc32 = 0
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes bytes."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)
        try:
            return self._stream.write(data)
        except OSError as error:
            self.problem = error
            raise


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._at
        self._stream.seek(self._start + self._at)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def _located(
    stream: BinaryIO,
    piece: Piece,
    dtype: torch.dtype,
    file: str,
    at: int,
    length: int,
    digest: str,
) -> WrittenPiece:
    """Finds the elements of a tensor inside its record, a zip archive of torch.save."""
    with zipfile.ZipFile(cast(BinaryIO, _Window(stream, at, length))) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data/0"))
    header = at + entry.header_offset
    stream.seek(header + _NAME_LENGTHS)
    name, extra = struct.unpack("<HH", stream.read(4))
    start = header + _NAME_LENGTHS + 4 + name + extra
    name_of_dtype = str(dtype).removeprefix("torch.")
    return WrittenPiece(piece, name_of_dtype, file, at, length, start, entry.file_size, digest)
