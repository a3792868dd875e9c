"""Proves that every tensor of a checkpoint lands once in each copy of the model, over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodeco.convert.operations import Region
from autodeco.convert.shards import ShardReader
from autodeco.engines.megatron.loading import Place, _local_target, parameters_by_target
from autodeco.errors import WeightsError
from autodeco.foreign import strict_json
from autodeco.layout import ParallelLayout
from autodeco.weights import BoundRule, BoundWeightMap, Dims


@dataclass(frozen=True)
class Landing:
    """Where the tensors of a checkpoint land; every count was checked over all ranks.

    Attributes:
        tensors: Source tensors that are used.
        dropped: Source tensors that are left out, with a reason.
        elements: Elements of the used ones.
        copies: Copies of everything but the experts, over all ranks.
        expert_copies: Copies of the experts; 0: there are none.
        split: Parameters of the whole model that lie in slices on several ranks of a copy.
        replicated: Parameters that every rank of a stage holds whole.
    """

    tensors: int
    dropped: int
    elements: int
    copies: int
    expert_copies: int
    split: int
    replicated: int


def tensor_names(index: Path) -> tuple[str, ...]:
    """Reads the tensor names of a ``model.safetensors.index.json``.

    Raises:
        WeightsError: The file cannot be read, has no weight_map, or names a tensor twice.
    """
    try:
        content = strict_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(index, f"the index cannot be read: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(index, "the index has no weight_map")
    return tuple(weight_map)


def _broken(where: Path, what: str) -> WeightsError:
    return WeightsError(what, where=str(where), fix="fetch the checkpoint's index again")


class Ledger:
    """Books what every rank holds; `close` proves that the books balance.

    Args:
        bound: The weight map, bound to the checkpoint's names.
        layout: How the model is spread.
        ranks: All processes.
    """

    def __init__(self, bound: BoundWeightMap, layout: ParallelLayout, ranks: int) -> None:
        self.bound, self.layout, self.ranks = bound, layout, ranks
        self._reader = _ShapeReader(bound.source_sizes())
        # target -> slice -> elements of the slice, and the ranks that hold it
        self._held: dict[str, dict[int, list[int]]] = defaultdict(dict)

    def enter(self, model: Any, place: Place, count: int) -> None:
        """Books a stage at one place, which `count` ranks hold alike.

        Raises:
            WeightsError: A parameter is not in the weight map, or what the loader would make for it
                has another shape.
        """
        shape = self.bound.shape
        wanted = parameters_by_target(model, shape, place)
        known: set[str] = set()
        for rule in self.bound.rules:
            names = [name for name in (rule.target, *rule.copies) if name in wanted]
            if not names:
                continue
            made = _local_target(rule, shape, place, self._reader)
            for name in names:
                if made.shape != wanted[name].shape:
                    raise WeightsError(
                        f"the engine's {name!r} has the shape {tuple(wanted[name].shape)}, the "
                        f"checkpoint gives {tuple(made.shape)}",
                        where=", ".join(rule.sources),
                        fix="the plugin's `megatron` fields do not fit its architecture",
                    )
                number = _slice(rule, place)
                box = self._held[name].setdefault(number, [made.numel(), 0])
                box[1] += count
            known.update(names)
        unknown = sorted(set(wanted) - known)
        if unknown:
            raise WeightsError(
                f"{len(unknown)} parameters of the engine are not in the weight map, the first is "
                f"{unknown[0]!r}",
                fix="the plugin's weight map or its `megatron` fields do not fit its architecture",
            )

    def close(self) -> Landing:
        """Proves that each target is there once in every copy of the model.

        Raises:
            WeightsError: One lands nowhere, in part, or more often than it should.
        """
        split = replicated = 0
        for rule in self.bound.rules:
            for name in (rule.target, *rule.copies):
                held = self._held.get(name)
                if held is None:
                    # One stage shares one parameter between the embedding and the output layer.
                    if name in rule.copies and self.layout.pipeline == 1:
                        continue
                    raise self._unbalanced(name, rule, "lands on no rank")
                self._balance(name, rule, held)
                split += len(held) > 1
                replicated += self._groups(rule) == 1
        sizes = self.bound.source_sizes()
        stage = self.ranks // self.layout.pipeline
        spread = self.layout.expert * self.layout.expert_tensor
        return Landing(
            tensors=len(sizes),
            dropped=len(self.bound.dropped),
            elements=sum(prod(size) for size in sizes.values()),
            copies=stage // self.layout.tensor,
            expert_copies=stage // spread if self.bound.shape.num_experts else 0,
            split=split,
            replicated=replicated,
        )

    def _balance(self, name: str, rule: BoundRule, held: dict[int, list[int]]) -> None:
        whole = sum(prod(part.size) for part in rule.parts)
        landed = sum(elements for elements, _ in held.values())
        if landed != whole:
            raise self._unbalanced(name, rule, f"{landed} of {whole} elements land")
        expected = self.ranks // self.layout.pipeline // self._groups(rule)
        for number, (_, count) in held.items():
            if count != expected:
                problem = f"slice {number} lands on {count} ranks instead of {expected}"
                raise self._unbalanced(name, rule, problem)

    def _groups(self, rule: BoundRule) -> int:
        """The parts that the ranks of a stage fall into, each of which holds another slice."""
        if rule.of_expert:
            return self.layout.expert * self.layout.expert_tensor
        return 1 if rule.rule.parallel_dim is None else self.layout.tensor

    def _unbalanced(self, name: str, rule: BoundRule, problem: str) -> WeightsError:
        return WeightsError(
            f"{name!r}: {problem}",
            where=f"{', '.join(rule.sources)}, layout {self.layout}, {self.ranks} ranks",
            fix="the plugin's weight map or its `megatron` fields do not fit its architecture",
        )


def _slice(rule: BoundRule, place: Place) -> int:
    if rule.rule.parallel_dim is None:
        return 0
    return place.expert_tensor if rule.of_expert else place.tensor


class _ShapeReader(ShardReader):
    """Gives slices without bytes where the loader would read them from a file."""

    def __init__(self, sizes: Mapping[str, Dims]) -> None:
        self._sizes = sizes

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Returns a block of a tensor, on the meta device."""
        region = region or tuple((0, size) for size in self._sizes[name])
        return torch.empty([stop - start for start, stop in region], device="meta")
