"""Packs source tensors into a target, and back, by the kind of their rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodeco.errors import WeightsError
from autodeco.family import ModelShape
from autodeco.weights import BoundRule


def pack(rule: BoundRule, shape: ModelShape, sources: Sequence[Tensor]) -> Tensor:
    """Makes a target from its sources.

    Args:
        rule: One bound rule.
        shape: The model's shape.
        sources: The tensors named in ``rule.sources``, in that order, of any dtype.

    Returns:
        The target, of the sources' dtype; bit-exact.

    Raises:
        WeightsError: A source has another shape than the rule says.
    """
    for name, size, tensor in zip(rule.sources, rule.source_sizes, sources, strict=True):
        if tuple(tensor.shape) != size:
            raise WeightsError(
                f"the tensor has the shape {tuple(tensor.shape)}, expected {size}",
                where=name,
                fix="the checkpoint does not fit the preset: check --plugin and --preset",
            )
    if rule.rule.kind == "qkv":
        groups = [t.reshape(shape.num_kv_heads, -1, *t.shape[1:]) for t in sources]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if rule.rule.kind == "gate_up":
        return torch.cat(list(sources), dim=0)
    return sources[0]


def unpack(rule: BoundRule, shape: ModelShape, target: Tensor) -> tuple[Tensor, ...]:
    """Makes the sources from a target: the exact inverse of `pack`.

    Args:
        rule: One bound rule.
        shape: The model's shape.
        target: The whole target (not a rank's slice).

    Returns:
        The tensors named in ``rule.sources``, in that order, contiguous.

    Raises:
        WeightsError: The target has another number of rows than the rule says.
    """
    rows = sum(size[0] for size in rule.source_sizes)
    if target.shape[0] != rows:
        raise WeightsError(
            f"the tensor has {target.shape[0]} rows, expected {rows}",
            where=rule.target,
            fix="give the whole tensor, of a model of this preset",
        )
    if rule.rule.kind == "qkv":
        grouped = target.reshape(shape.num_kv_heads, -1, *target.shape[1:])
        queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
        parts = torch.split(grouped, [queries, shape.head_dim, shape.head_dim], dim=1)
        return tuple(part.flatten(0, 1).contiguous() for part in parts)
    if rule.rule.kind == "gate_up":
        return tuple(part.contiguous() for part in target.chunk(2, dim=0))
    return (target,)
