"""Packs the parts of source tensors into a target, and back, by the kind of their rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from autodeco.errors import WeightsError
from autodeco.family import ModelShape
from autodeco.weights import BoundRule, BoundWeightMap, SourcePart, source_sizes

#: Where to read in a tensor: start and stop in each dimension.
Region = tuple[tuple[int, int], ...]


class Reader(Protocol):
    """What reads blocks of the checkpoint's tensors."""

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Returns a block of a tensor, or all of it."""
        ...


def pack(rule: BoundRule, shape: ModelShape, parts: Iterable[Tensor]) -> Tensor:
    """Makes a target from its parts.

    Args:
        rule: One bound rule.
        shape: The model's shape; of it, the number of key and value heads that the parts have.
        parts: The tensors of ``rule.parts``, in that order, as the target sees them, of any dtype;
            taken one at a time, so that a generator need not hold them all.

    Returns:
        The target, of the parts' dtype; bit-exact.

    Raises:
        WeightsError: A part has another shape than the rule says.
    """
    tensors = iter(parts)
    if len(rule.parts) == 1:
        tensor = _checked(next(tensors), rule.parts[0])
        return torch.cat((tensor[0::2], tensor[1::2])) if rule.rule.interleaved else tensor
    heads = shape.num_kv_heads if rule.rule.kind == "qkv" else 1
    rows, start = sum(part.size[0] for part in rule.parts), 0
    target: Tensor | None = None
    for part in rule.parts:
        tensor = _checked(next(tensors), part)
        if target is None:
            target = tensor.new_empty((rows, *tensor.shape[1:]))
        elif target.dtype != tensor.dtype:
            target = target.to(torch.promote_types(target.dtype, tensor.dtype))
        grouped = target.view(heads, rows // heads, *tensor.shape[1:])
        stop = start + part.size[0] // heads
        grouped[:, start:stop] = tensor.reshape(heads, -1, *tensor.shape[1:])
        start = stop
        del tensor  # before the next is read
    assert target is not None
    return target


def _checked(tensor: Tensor, part: SourcePart) -> Tensor:
    if tuple(tensor.shape) != part.size:
        raise WeightsError(
            f"the tensor has the shape {tuple(tensor.shape)}, expected {part.size}",
            where=part.source,
            fix="the checkpoint does not fit the preset: check --plugin and --preset",
        )
    return tensor


def unpack(rule: BoundRule, shape: ModelShape, target: Tensor) -> tuple[Tensor, ...]:
    """Makes the parts from a target: the exact inverse of `pack`.

    Args:
        rule: One bound rule.
        shape: The model's shape.
        target: The whole target (not a rank's slice).

    Returns:
        The tensors of ``rule.parts``, in that order, contiguous.

    Raises:
        WeightsError: The target has another number of rows than the rule says.
    """
    rows = sum(part.size[0] for part in rule.parts)
    if target.shape[0] != rows:
        raise WeightsError(
            f"the tensor has {target.shape[0]} rows, expected {rows}",
            where=rule.target,
            fix="give the whole tensor, of a model of this preset",
        )
    if rule.rule.kind == "qkv":
        grouped = target.reshape(shape.num_kv_heads, -1, *target.shape[1:])
        queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
        found = torch.split(grouped, [queries, shape.head_dim, shape.head_dim], dim=1)
        return tuple(part.flatten(0, 1).contiguous() for part in found)
    if rule.rule.interleaved:
        halves = target.chunk(2)
        return (torch.stack(halves, dim=1).flatten(0, 1),)
    found = torch.split(target, [part.size[0] for part in rule.parts])
    return tuple(part.contiguous() for part in found)


def read_target(
    rule: BoundRule, shape: ModelShape, reader: Reader, rank: int = 0, ranks: int = 1
) -> Tensor:
    """Reads a tensor rank's slice of a target; no other byte is read.

    Args:
        rule: One bound rule.
        shape: The whole model's shape.
        reader: Of the source checkpoint.
        rank, ranks: Which slice of those that tensor parallelism makes; a target that it does not
            split is read whole.

    Raises:
        WeightsError: A part has another shape than the rule says.
    """
    dim = rule.rule.parallel_dim
    if dim is None or ranks == 1:
        return pack(rule, shape, (_read_part(part, reader) for part in rule.parts))
    parts = tuple(_slice(part, dim, rank, ranks) for part in rule.parts)
    tensors = (_read_part(part, reader, column) for part, column in parts)
    local = dataclasses.replace(
        shape, num_heads=shape.num_heads // ranks, num_kv_heads=shape.num_kv_heads // ranks
    )
    return pack(dataclasses.replace(rule, parts=tuple(p for p, _ in parts)), local, tensors)


def _slice(part: SourcePart, dim: int, rank: int, ranks: int) -> tuple[SourcePart, int]:
    """A rank's slice of a part, and the column that it begins at."""
    size = list(part.size)
    size[dim] //= ranks
    start = rank * size[dim]
    rows, column = (start, 0) if dim == 0 else (0, start)
    return dataclasses.replace(part, size=tuple(size), start=part.start + rows), column


def _read_part(part: SourcePart, reader: Reader, column: int = 0) -> Tensor:
    region = [(part.start, part.start + part.size[0])]
    if len(part.size) > 1:
        region.append((column, column + part.size[1]))
    if part.transposed:
        region.reverse()
    if part.expert is not None:
        region.insert(0, (part.expert, part.expert + 1))
    tensor = reader.read(part.source, tuple(region))
    if part.expert is not None:
        tensor = tensor[0]
    return tensor.t() if part.transposed else tensor


def sources_from_targets(
    bound: BoundWeightMap, target: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Makes the source tensors again, one after the other: the inverse of `read_target`.

    Args:
        bound: The weight map of the model.
        target: Returns a whole target by its name; asked for those of one source at a time.

    Yields:
        Name and tensor of each source, of the targets' dtype; it may be a view of the target.
    """
    rules: dict[str, list[BoundRule]] = {}
    for rule in bound.rules:
        for name in rule.sources:
            rules.setdefault(name, []).append(rule)
    last: tuple[str, Mapping[SourcePart, Tensor]] = ("", {})
    for name, mine in rules.items():
        size = source_sizes(mine)[name]
        whole: Tensor | None = None
        for rule in mine:
            if last[0] != rule.target:
                tensors = unpack(rule, bound.shape, target(rule.target))
                last = rule.target, dict(zip(rule.parts, tensors, strict=True))
            for part in rule.parts:
                if part.source != name:
                    continue
                tensor = last[1][part]
                if _is_whole(part, size):
                    whole = tensor
                    continue
                if whole is None:
                    whole = torch.empty(size, dtype=tensor.dtype)
                _view(whole, part).copy_(tensor)
        assert whole is not None
        yield name, whole


def _is_whole(part: SourcePart, size: tuple[int, ...]) -> bool:
    """Whether a part is all of its source, in the source's own order."""
    return part.expert is None and not part.transposed and part.size == size


def _view(whole: Tensor, part: SourcePart) -> Tensor:
    """The block of a source tensor that a part is, as the target sees it."""
    mine = whole if part.expert is None else whole[part.expert]
    mine = mine.t() if part.transposed else mine
    return mine[part.start : part.start + part.size[0]]
