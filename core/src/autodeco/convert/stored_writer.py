"""Writes pieces in torch.distributed.checkpoint's format, one tensor at a time, and its metadata.

The format is written by torch's own `FileSystemWriter`, part by part, so that parts can be written
by any rank, in any run; only ``.metadata`` says what they make up together.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from autodeco.convert.operations import read_target
from autodeco.convert.shards import ShardReader
from autodeco.convert.stored import Part, Piece, WrittenFile, WrittenPiece, file_sha256, span_sha256
from autodeco.errors import EnvironmentProblem, WeightsError
from autodeco.files import atomic_file, atomic_write_json
from autodeco.hookspecs import ImportedWeights

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAME_LENGTHS = 26  # where a zip entry's own header has the lengths of its name and extra field
# megatron-core's CheckpointingConfig, as its save_config writes it
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class PieceSource:
    """Makes pieces from the source checkpoint, in the order of their targets.

    Args:
        weights: The source, in Hugging Face format.
        reader: It, open.
    """

    def __init__(self, weights: ImportedWeights, reader: ShardReader) -> None:
        self._shape, self._reader = weights.shape, reader
        self._rules = {rule.target: rule for rule in weights.weight_map.rules}
        self._last: tuple[str, Tensor] | None = None

    def dtype(self, piece: Piece) -> torch.dtype:
        """Returns the dtype of a piece, which is that of its sources.

        Raises:
            WeightsError: They differ, or it is none that megatron-core stores.
        """
        sources = self._rules[piece.target].sources
        kinds = {self._reader.tensors[name].dtype for name in sources}
        if len(kinds) > 1 or not kinds <= set(_DTYPES):
            raise WeightsError(
                f"the tensors are stored as {', '.join(sorted(kinds))}",
                where=", ".join(sources),
                fix="import a checkpoint in one of " + ", ".join(_DTYPES),
            )
        return _DTYPES[kinds.pop()]

    def read(self, piece: Piece) -> Tensor:
        """Returns a piece; the target that it is cut from is kept for the next one."""
        if self._last is None or self._last[0] != piece.target:
            self._last = None  # free it before the next is read
            target = read_target(self._rules[piece.target], self._shape, self._reader)
            self._last = (piece.target, target.to(self.dtype(piece)))
        rows = self._last[1]
        if rows.shape[0] == piece.shape[0]:
            self._last = None
        return rows[piece.first_row : piece.first_row + piece.shape[0]]


def write_part(
    directory: Path, number: int, pieces: Sequence[Piece], source: PieceSource, blob: str | None
) -> Part:
    """Writes one file of pieces and reads it back.

    At most the pieces of one part are held in memory, and the target that is being packed.

    Args:
        directory: ``weights/``.
        number: Of the part; its file is named after it.
        pieces: What goes into it.
        source: Where they come from.
        blob: Write an empty object under this key as well.

    Raises:
        EnvironmentProblem: The file cannot be written, or does not read back as it was written.
    """
    planner = _Planner(pieces, source)
    files = _DurableFiles()
    writer = FileSystemWriter(directory, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = files
    writer.set_up_storage_writer(False, rank=number, use_collectives=False)
    items = [planner.item(number) for number in range(len(pieces))]
    if blob is not None:
        items.append(WriteItem(MetadataIndex(blob), WriteItemType.BYTE_IO))
    plan = writer.prepare_local_plan(SavePlan(items))
    results = {r.index: r.storage_data for r in writer.write_data(plan, planner).value()}
    ((file, digest),) = files.written.items()
    path = directory / file
    with path.open("rb") as stream:
        written = tuple(
            _located(
                stream,
                piece,
                source.dtype(piece),
                results[item.index],
                planner.digests[item.index],
            )
            for piece, item in zip(pieces, items, strict=False)
        )
        intact = all(span_sha256(stream, w.start, w.size) == w.sha256 for w in written)
    if not intact or file_sha256(path) != digest:
        path.unlink()
        raise EnvironmentProblem(
            "the file does not read back as it was written",
            where=str(path),
            fix="check the disk, then run the same command again",
        )
    info = results[MetadataIndex(blob)] if blob is not None else None
    at = (info.offset, info.length) if info is not None else None
    return Part(file, WrittenFile(path.stat().st_size, digest), written, at)


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
    _NoPathsWriter(directory).finish(metadata, [results])
    with atomic_file(directory / "common.pt") as stream:
        torch.save({}, stream)
    atomic_write_json(directory / "metadata.json", _CONFIG)
    names = (".metadata", "common.pt", "metadata.json")
    paths = [directory / name for name in names]
    return {p.name: WrittenFile(p.stat().st_size, file_sha256(p)) for p in paths}


class _NoPathsWriter(FileSystemWriter):
    def storage_meta(self) -> None:
        """Keeps this machine's path out of the file."""
        return


class _Planner(DefaultSavePlanner):
    """Gives the writer one tensor at a time, made when it is asked for."""

    def __init__(self, pieces: Sequence[Piece], source: PieceSource) -> None:
        super().__init__()
        self._pieces, self._source = pieces, source
        self._by_index: dict[MetadataIndex, Piece] = {}
        self.digests: dict[MetadataIndex, str] = {}

    def item(self, number: int) -> WriteItem:
        """Returns the request to write a piece."""
        piece = self._pieces[number]
        index = MetadataIndex(piece.key, piece.offset)
        self._by_index[index] = piece
        chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.stored_shape))
        properties = TensorProperties(dtype=self._source.dtype(piece))
        data = TensorWriteData(chunk, properties, torch.Size(piece.global_shape))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Makes the tensor (or the empty object) of a request."""
        if write_item.type == WriteItemType.BYTE_IO:
            # what megatron-core stores for a module without an extra state
            stream = io.BytesIO()
            torch.save([None], stream)
            return stream
        piece = self._by_index[write_item.index]
        tensor = self._source.read(piece).contiguous().reshape(piece.stored_shape)
        raw = tensor.view(-1).view(torch.uint8).numpy()
        self.digests[write_item.index] = hashlib.sha256(raw.data).hexdigest()
        return tensor


class _DurableFiles(FileSystem):
    """Files that appear under their names only when they are whole and on the disk."""

    def __init__(self) -> None:
        self.written: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with atomic_file(Path(path)) as stream:
            hashing = _HashingStream(stream)
            try:
                yield hashing
            except RuntimeError as error:
                if hashing.problem is None:
                    raise
                raise hashing.problem from error  # torch.save hides a full disk
        self.written[Path(path).name] = hashing.digest.hexdigest()


class _HashingStream(io.RawIOBase):
    """Passes on what is written and hashes it; whoever opened the stream closes it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes bytes."""
        self.digest.update(data)
        try:
            return self._stream.write(data)
        except OSError as error:
            self.problem = error
            raise

    def tell(self) -> int:
        """Returns the position."""
        return self._stream.tell()


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
    stream: BinaryIO, piece: Piece, dtype: torch.dtype, info: Any, sha: str
) -> WrittenPiece:
    """Finds the elements of a tensor inside its record, a zip archive of torch.save."""
    with zipfile.ZipFile(cast(BinaryIO, _Window(stream, info.offset, info.length))) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data/0"))
    header = info.offset + entry.header_offset
    stream.seek(header + _NAME_LENGTHS)
    name, extra = struct.unpack("<HH", stream.read(4))
    start = header + _NAME_LENGTHS + 4 + name + extra
    stored = (info.relative_path, info.offset, info.length, start, entry.file_size)
    return WrittenPiece(piece, str(dtype).removeprefix("torch."), *stored, sha)
