"""Writes torch.distributed.checkpoint directories, by torch's own writer, in any chunks."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
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

Offset = tuple[int, ...]


def grid(tensor: Tensor, *cuts: Sequence[int]) -> list[tuple[Offset, Offset]]:
    """Chunks between the cuts in each dimension, as (offset, shape)."""
    edges = [[0, *c, n] for c, n in zip(cuts, tensor.shape, strict=True)]
    spans = [list(pairwise(e)) for e in edges]
    return [(tuple(a for a, _ in s), tuple(b - a for a, b in s)) for s in product(*spans)]


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    chunks: Mapping[str, list[tuple[Offset, Offset]]] | None = None,
    file_of: Callable[[str, Offset], int] = lambda key, offset: 0,
    objects: Sequence[str] = (),
) -> None:
    """Writes whole tensors, or their `chunks`, into the files that `file_of` numbers."""
    directory.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    items: dict[int, list[WriteItem]] = {}
    for key, tensor in tensors.items():
        whole = [((0,) * tensor.ndim, tuple(tensor.shape))]
        listed = [_chunk(*c) for c in (chunks or {}).get(key, whole)]
        properties = TensorProperties.create_from_tensor(tensor)
        content[key] = TensorStorageMetadata(properties, tensor.size(), listed)
        for chunk in listed:
            data = TensorWriteData(chunk, properties, tensor.size())
            index = MetadataIndex(key, chunk.offsets)
            item = WriteItem(index, WriteItemType.SHARD, tensor_data=data)
            items.setdefault(file_of(key, tuple(chunk.offsets)), []).append(item)
    for key in objects:
        items.setdefault(0, []).append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
    results = []
    for number, plan in items.items():
        writer = FileSystemWriter(directory, sync_files=False)
        writer.set_up_storage_writer(False, rank=number, use_collectives=False)
        prepared = writer.prepare_local_plan(SavePlan(plan))
        results.append(writer.write_data(prepared, _Planner(tensors)).value())
    FileSystemWriter(directory).finish(Metadata(content), results)


def _chunk(offset: Offset, shape: Offset) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))


class _Planner(DefaultSavePlanner):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(b"an object")
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        cut = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        return self._tensors[write_item.index.fqn][cut].clone()


def forge(directory: Path) -> Iterator[Metadata]:
    """Yields the metadata once, as torch reads it, and writes it back as it is then."""
    path = directory / ".metadata"
    value = pickle.loads(path.read_bytes())
    yield value
    path.write_bytes(pickle.dumps(value))
