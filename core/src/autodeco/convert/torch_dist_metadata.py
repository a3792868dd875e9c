"""What a torch.distributed.checkpoint directory holds and where, read from its ``.metadata``.

That file is a pickle. It is read as data (`autodeco.convert.inert_pickle`): none of the names below
is imported, and nothing is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from autodeco.convert.inert_pickle import MOST_BYTES, Global, Inert, Pairs, read_pickle
from autodeco.errors import WeightsError
from autodeco.foreign import is_plain_name

METADATA = ".metadata"
Dims = tuple[int, ...]
#: Bytes of an element, by torch's name of the dtype.
ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8, "float64": 8,
}  # fmt: skip
_CHECKPOINT = "torch.distributed.checkpoint."
_MCORE = "megatron.core.dist_checkpointing.strategies.torch."
_ALLOWED = frozenset(
    {
        # the records: what is stored, in which blocks, and where each block is
        *(
            f"{_CHECKPOINT}metadata.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{_CHECKPOINT}filesystem._StorageInfo",
        # torch before 2.3 has the properties of a tensor here
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        # megatron-core has kinds of its own in the versions that NeMo 2 has, with a field more
        _MCORE + "MCoreMetadata",
        _MCORE + "MCoreSavePlan",
        # it keeps the plans of all ranks beside the records (`all_local_plans`)
        *(
            f"{_CHECKPOINT}planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
        # their fields: shapes, dtypes, layouts, the path that was written to
        "torch.Size",
        *(f"torch.{name}" for name in ITEM_BYTES),
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        # how early releases of Python 3.11 write a member of an enumeration; it is not called
        "builtins.getattr",
    }
)
_MOST_DIMS, _LARGEST = 16, 1 << 62
_MOST_CELLS = 1 << 26  # of the grid that chunks are compared on


@dataclass(frozen=True)
class StoredChunk:
    """A block of a tensor.

    Attributes:
        file: Its file's name.
        at: Where its record begins in the file.
        length: Bytes of the record.
        offset: Where the block begins in the tensor.
        shape: The block's.
    """

    file: str
    at: int
    length: int
    offset: Dims
    shape: Dims


@dataclass(frozen=True)
class StoredTensorInfo:
    """A stored tensor; its chunks cover it, and none overlaps another.

    Attributes:
        key: Its name.
        dtype: As torch names it, without ``torch.``.
        shape: The whole tensor's.
        chunks: Its blocks.
    """

    key: str
    dtype: str
    shape: Dims
    chunks: tuple[StoredChunk, ...]

    @property
    def itemsize(self) -> int:
        """Returns the bytes of an element."""
        return ITEM_BYTES[self.dtype]


class TorchDistMetadata:
    """The content of a ``.metadata``; a tensor's chunks are checked when it is asked for.

    So a checkpoint's damaged or exotic part (an optimizer's flattened state) does not keep anybody
    from reading another.

    Args:
        directory: The one with the file.

    Raises:
        WeightsError: The file is missing, too large, damaged or forged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / METADATA
        tree = read_pickle(_content(self.path), _ALLOWED, str(self.path))
        of_megatron = isinstance(tree, Inert) and tree.name == _MCORE + "MCoreMetadata"
        root = self._fields(tree, "MCoreMetadata" if of_megatron else "Metadata")
        self._tensors: dict[str, Mapping[str, Any]] = {}
        self.objects: set[str] = set()
        for key, entry in _pairs(root.get("state_dict_metadata"), self._broken):
            if not isinstance(key, str) or key in self._tensors or key in self.objects:
                raise self._broken("a key is no text, or stands there twice")
            if isinstance(entry, Inert) and entry.name.endswith(".BytesStorageMetadata"):
                self.objects.add(key)
            else:
                self._tensors[key] = self._fields(entry, "TensorStorageMetadata")
        self._places = self._storage(root.get("storage_data"))

    def __iter__(self) -> Iterator[str]:
        """Iterates over the keys of tensors."""
        return iter(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> Dims:
        """Returns a tensor's whole shape.

        Raises:
            WeightsError: The file does not say it.
        """
        return self._dims(self._tensors[key].get("size"))

    def tensor(self, key: str) -> StoredTensorInfo:
        """Returns where a tensor is.

        Raises:
            WeightsError: There is none of this name, or its chunks do not make it up.
        """
        if key not in self._tensors:
            raise WeightsError(
                f"there is no tensor {key!r}",
                where=str(self.path),
                fix="give the checkpoint of this model, whole",
            )
        entry, shape = self._tensors[key], self.shape(key)
        listed = entry.get("chunks")
        if type(listed) is not list or len(listed) > len(self._places):
            raise self._broken(f"{key!r} has no list of chunks, or more of them than are stored")
        chunks = tuple(self._chunk(key, value) for value in listed)
        info = StoredTensorInfo(key, self._dtype(key, entry.get("properties")), shape, chunks)
        if (problem := _misfit(info)) is not None:
            raise self._broken(f"{key!r}: {problem}")
        return info

    def _broken(self, what: str) -> WeightsError:
        return WeightsError(
            what,
            where=str(self.path),
            fix="the file is damaged, forged or of an unknown version: fetch or write the "
            "checkpoint again",
        )

    def _fields(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Inert) or value.name.rpartition(".")[2] != name:
            raise self._broken(f"a record of {name} is expected, and there is another thing")
        return value.fields()

    def _dims(self, value: Any) -> Dims:
        if isinstance(value, Inert) and value.name == "torch.Size" and len(value.args) == 1:
            value = value.args[0]
        if isinstance(value, list):
            value = tuple(value)
        if not isinstance(value, tuple) or len(value) > _MOST_DIMS:
            raise self._broken("a shape is no short row of numbers")
        if any(type(n) is not int or not 0 <= n < _LARGEST for n in value):
            raise self._broken("a shape has something else than sizes")
        return value

    def _dtype(self, key: str, properties: Any) -> str:
        known = isinstance(properties, Inert) and properties.name.endswith(".TensorProperties")
        first: Any = None
        if known:
            state = properties.state if isinstance(properties.state, tuple) else properties.args
            first = properties.fields().get("dtype", state[0] if state else None)
        name = first.name.removeprefix("torch.") if isinstance(first, Global) else ""
        if name not in ITEM_BYTES:
            raise self._broken(f"{key!r} has no dtype")
        return name

    def _storage(self, value: Any) -> dict[tuple[str, Dims], tuple[str, int, int]]:
        """Returns (key, offset) -> file, first byte and length of the record."""
        found: dict[tuple[str, Dims], tuple[str, int, int]] = {}
        for index, info in _pairs(value, self._broken):
            what, where = self._fields(index, "MetadataIndex"), self._fields(info, "_StorageInfo")
            key = what.get("fqn")
            if not isinstance(key, str):
                raise self._broken("a record has no key")
            if key not in self._tensors:
                continue  # an object: its place is of no interest
            name, at, length = (where.get(n) for n in ("relative_path", "offset", "length"))
            if not is_plain_name(name):
                raise WeightsError(
                    f"{key!r} lies in {name!r}, outside the directory",
                    where=str(self.path),
                    fix="do not use this checkpoint: its metadata is forged or damaged",
                )
            if any(type(n) is not int or not 0 <= n < _LARGEST for n in (at, length)):
                raise self._broken(f"the place of {key!r} is no place")
            if where.get("transform_descriptors"):
                raise self._broken(f"{key!r} is stored compressed or encrypted, which is not read")
            place = key, self._dims(what.get("offset") or ())
            if place in found:
                raise self._broken(f"a block of {key!r} is stored twice")
            found[place] = str(name), int(at or 0), int(length or 0)
        return found

    def _chunk(self, key: str, value: Any) -> StoredChunk:
        fields = self._fields(value, "ChunkStorageMetadata")
        offset, shape = self._dims(fields.get("offsets")), self._dims(fields.get("sizes"))
        place = self._places.get((key, offset))
        if place is None:
            raise self._broken(f"{key!r}: the chunk at {offset} is not stored anywhere")
        return StoredChunk(*place, offset, shape)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise WeightsError(
            "the checkpoint has no .metadata",
            where=str(path),
            fix="give a directory that torch.distributed.checkpoint has written, whole",
        ) from error
    except OSError as error:
        raise WeightsError(
            f"cannot read: {error.strerror or error}", where=str(path), fix="check the disk"
        ) from error


def _pairs(value: Any, broken: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, Pairs):
        raise broken("a table is missing")
    return value


def _misfit(info: StoredTensorInfo) -> str | None:
    """Says why the chunks do not make up the tensor; None: they do."""
    shape, chunks = info.shape, info.chunks
    for chunk in chunks:
        if len(chunk.offset) != len(shape) or len(chunk.shape) != len(shape):
            return f"the chunk at {chunk.offset} has not its {len(shape)} dimensions"
        ends = (a + b for a, b in zip(chunk.offset, chunk.shape, strict=True))
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            return f"the chunk at {chunk.offset} of {chunk.shape} reaches beyond {shape}"
    # within bounds and as many elements as the tensor: if none overlaps, they cover it
    covered = sum(prod(chunk.shape) for chunk in chunks)
    if covered < prod(shape):
        return f"the chunks cover {covered:,} of {prod(shape):,} elements"
    if covered > prod(shape) or _overlap([c for c in chunks if prod(c.shape)], len(shape)):
        return "chunks overlap, or are cut too unevenly to tell"
    return None


def _overlap(chunks: Sequence[StoredChunk], dims: int) -> bool:
    """Whether two of them overlap: each marks its cells of the grid of all their borders."""
    borders = [
        sorted({x for c in chunks for x in (c.offset[d], c.offset[d] + c.shape[d])})
        for d in range(dims)
    ]
    if prod(len(b) for b in borders) > _MOST_CELLS:
        return True  # no real checkpoint is cut up so unevenly
    places = [{x: n for n, x in enumerate(b)} for b in borders]
    taken = np.zeros([len(b) for b in borders], dtype=bool)
    for chunk in chunks:
        cells = tuple(
            slice(places[d][chunk.offset[d]], places[d][chunk.offset[d] + chunk.shape[d]])
            for d in range(dims)
        )
        if taken[cells].any():
            return True
        taken[cells] = True
    return False
