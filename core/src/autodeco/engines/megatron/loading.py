"""Fills a stage from a Hugging Face checkpoint or an imported one: each rank reads its slices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeco.convert.operations import read_target
from autodeco.convert.shards import ShardReader
from autodeco.convert.stored_reader import StoredReader
from autodeco.errors import NumericsError, WeightsError
from autodeco.family import ModelShape
from autodeco.hookspecs import ImportedWeights
from autodeco.weights import BoundRule

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_LAST_BIAS = ".linear_fc2.bias"
_EXPERT = re.compile(r"local_experts\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the groups that split tensors.

    Attributes:
        tensor, tensor_ranks: Its place among the ranks that split matrices.
        expert, expert_ranks: Its place among the ranks that split the experts.
        expert_tensor, expert_tensor_ranks: Its place among those that split each expert.
    """

    tensor: int
    tensor_ranks: int
    expert: int
    expert_ranks: int
    expert_tensor: int
    expert_tensor_ranks: int


def parameters_by_target(model: Any, shape: ModelShape, place: Place) -> dict[str, Tensor]:
    """Returns a stage's parameters, and buffers that a checkpoint has, under the names that the
    whole model has for them."""
    experts = shape.num_experts // place.expert_ranks
    found: dict[str, Tensor] = {}
    for name, parameter in stored_state(model):
        target = _EXPERT.sub(lambda m: f"local_experts.{int(m[1]) + place.expert * experts}.", name)
        layer = _LAYER.match(target)
        if layer is not None:
            number = model.decoder.layers[int(layer[1])].layer_number - 1
            target = f"decoder.layers.{number}.{target[layer.end() :]}"
        found[target] = parameter
    return found


def stored_state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields a stage's parameters, and the buffers that a checkpoint has, with their names."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def load_stage(model: Any, weights: ImportedWeights, place: Place) -> None:
    """Reads what the stage holds; every parameter is filled exactly once.

    Raises:
        WeightsError: A parameter of the stage is not in the weight map, or a slice has another
            shape than its parameter.
        NumericsError: A weight is not finite.
    """
    shape = weights.shape
    wanted = parameters_by_target(model, shape, place)
    filled: set[str] = set()
    with _open(weights) as reader:
        for rule in weights.weight_map.rules:
            targets = [name for name in (rule.target, *rule.copies) if name in wanted]
            if not targets:
                continue
            value = _local_target(rule, shape, place, reader)
            for name in targets:
                _fill(wanted[name], value, name, rule)
                filled.add(name)
    empty = sorted(set(wanted) - filled)
    if empty:
        raise WeightsError(
            f"{len(empty)} parameters of the engine are not in the weight map, the first is "
            f"{empty[0]!r}",
            where=str(weights.path),
            fix="the plugin's weight map or its `megatron` fields do not fit its architecture",
        )


def _open(weights: ImportedWeights) -> ShardReader | StoredReader:
    if weights.distributed is not None:
        return StoredReader(weights.distributed)
    return ShardReader(weights.path, weights.formats)


def _local_target(
    rule: BoundRule, shape: ModelShape, place: Place, reader: ShardReader | StoredReader
) -> Tensor:
    """Reads this rank's slice of a target, or of every source, which it packs."""
    rank = place.expert_tensor if rule.of_expert else place.tensor
    ranks = place.expert_tensor_ranks if rule.of_expert else place.tensor_ranks
    if isinstance(reader, StoredReader):
        dim = rule.rule.parallel_dim
        value = reader.read(rule.target, dim or 0, *((0, 1) if dim is None else (rank, ranks)))
    else:
        value = read_target(rule, shape, reader, rank, ranks)
    # the ranks that split an expert each add its last bias before their sums are added
    shared = rule.of_expert and ranks > 1 and rule.target.endswith(_LAST_BIAS)
    return value / ranks if shared else value


def _fill(parameter: Tensor, value: Tensor, name: str, rule: BoundRule) -> None:
    if parameter.shape != value.shape:
        raise WeightsError(
            f"the engine's {name!r} has the shape {tuple(parameter.shape)}, the checkpoint gives "
            f"{tuple(value.shape)}",
            where=", ".join(rule.sources),
            fix="the plugin's `megatron` fields do not fit its architecture",
        )
    with torch.no_grad():
        parameter.copy_(value)
    if not bool(torch.isfinite(parameter).all()):
        raise NumericsError(
            f"the weight {rule.sources[0]!r} holds NaN or infinity",
            where=name,
            fix="the checkpoint is damaged, or its values do not fit --dtype: fetch it again, or "
            "try --dtype float32",
        )
