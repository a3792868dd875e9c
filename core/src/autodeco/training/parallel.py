"""Data-parallel training: what ranks tell each other. Without torch.distributed all is local."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autodeco.heads.objective import ObjectiveSums

_Value = TypeVar("_Value")


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(value: _Value) -> _Value:
    """Returns rank 0's value on every rank; it alone reads the disk, so all agree."""
    if not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    result: _Value = box[0]
    return result


def largest_of_ranks(value: int, device: torch.device) -> int:
    """Returns the largest value of all ranks: a signal does not reach all in one step."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())


def add_gradients(flat: Tensor) -> None:
    """Sums a flat float32 gradient over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(flat)


def add_sums(sums: ObjectiveSums, device: torch.device) -> ObjectiveSums:
    """Adds the sums of all ranks, in float64."""
    if not dist.is_initialized():
        return sums
    names = list(vars(sums))
    values = torch.tensor(
        [float(getattr(sums, n)) for n in names], dtype=torch.float64, device=device
    )
    dist.all_reduce(values)
    kinds = [type(getattr(ObjectiveSums.zero(), n)) for n in names]
    pairs = zip(names, kinds, values.tolist(), strict=True)
    return ObjectiveSums(**{n: kind(v) for n, kind, v in pairs})


def wait_for_all() -> None:
    """Returns when every rank is here."""
    if dist.is_initialized():
        dist.barrier()
