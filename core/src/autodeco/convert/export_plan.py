"""Which tensors an exported checkpoint has, and in which files: planned before a byte is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from autodeco.convert.direct_reader import TORCH_DTYPES
from autodeco.convert.shard_writer import ShardPlan, index_of, plan_shard
from autodeco.errors import WeightsError
from autodeco.safetensors_header import DTYPE_BYTES, SINGLE
from autodeco.weights import BoundRule, BoundWeightMap, source_sizes

SHARD_BYTES = 5_000_000_000
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class ExportGroup:
    """Source tensors that are made of the same targets, together.

    Attributes:
        bound: The weight map, with their rules alone.
        size: Bytes of the tensors.
    """

    bound: BoundWeightMap
    size: int


@dataclass(frozen=True)
class ExportShard:
    """One file of the result.

    Attributes:
        file: Its name.
        groups: In the order of the file.
        plan: Its header, and where each tensor goes.
    """

    file: str
    groups: tuple[ExportGroup, ...]
    plan: ShardPlan


@dataclass(frozen=True)
class ExportPlan:
    """An export to be done.

    Attributes:
        shards: The files.
        dropped: Tensors of the source that are not there -> why.
    """

    shards: tuple[ExportShard, ...]
    dropped: Mapping[str, str]

    @property
    def size(self) -> int:
        """Returns the bytes of the files with tensors."""
        return sum(shard.plan.size for shard in self.shards)

    @property
    def count(self) -> int:
        """Returns how many tensors there are."""
        return sum(len(shard.plan.tensors) for shard in self.shards)

    @property
    def index(self) -> dict[str, Any]:
        """Returns the index; transformers reads it where there are several files."""
        return index_of({shard.file: shard.plan for shard in self.shards})


def plan_export(
    bound: BoundWeightMap,
    dtype: Callable[[str], torch.dtype],
    *,
    limit: int = SHARD_BYTES,
    dropped: Mapping[str, str] | None = None,
) -> ExportPlan:
    """Plans the files.

    Args:
        bound: The weight map.
        dtype: Returns the dtype that a target is stored in.
        limit: Bytes of the tensors in a file; more only where one group has more.
        dropped: What the checkpoint had and the export has not -> why.

    Raises:
        WeightsError: The targets that make up a tensor are stored in several dtypes.
    """
    shards: list[list[tuple[ExportGroup, list[tuple[str, str, tuple[int, ...]]]]]] = []
    room = 0
    for rules in _groups(bound):
        kind = _dtype(rules, dtype)
        tensors = [(name, kind, size) for name, size in source_sizes(rules).items()]
        size = sum(prod(shape) * DTYPE_BYTES[kind] for _, _, shape in tensors)
        if size > room:
            shards.append([])
            room = limit
        room -= size
        group = ExportGroup(dataclasses.replace(bound, rules=tuple(rules)), size)
        shards[-1].append((group, tensors))
    named = (
        (SINGLE if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors", shard)
        for n, shard in enumerate(shards, 1)
    )
    made = tuple(
        ExportShard(
            file,
            tuple(group for group, _ in shard),
            plan_shard(tensor for _, tensors in shard for tensor in tensors),
        )
        for file, shard in named
    )
    return ExportPlan(made, {**bound.dropped, **(dropped or {})})


def _groups(bound: BoundWeightMap) -> Iterator[list[BoundRule]]:
    """Yields rules that share sources, together, in the order of the map."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for rule in bound.rules:
        for name in rule.sources:
            leader[find(name)] = find(rule.sources[0])
    groups: dict[str, list[BoundRule]] = {}
    for rule in bound.rules:
        groups.setdefault(find(rule.sources[0]), []).append(rule)
    yield from groups.values()


def _dtype(rules: list[BoundRule], dtype: Callable[[str], torch.dtype]) -> str:
    kinds = {dtype(rule.target) for rule in rules}
    if len(kinds) > 1:
        raise WeightsError(
            "the parts of a tensor are stored as "
            + ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
            where=rules[0].sources[0],
            fix="give a checkpoint whose layers are stored alike",
        )
    return _NAMES[kinds.pop()]
