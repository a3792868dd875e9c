"""Sequences split over context-parallel ranks, so that each has the same share of causal work.

A sequence is cut into twice as many chunks as there are ranks, and rank r holds chunks r and
2 * ranks - 1 - r: a short reach back and a long one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(rank: int, ranks: int, length: int) -> Tensor:
    """Returns the positions that a rank holds, int64 [length / ranks].

    Args:
        rank: Its place in the group.
        ranks: The group's size.
        length: Of the whole sequence, a multiple of 2 * ranks.
    """
    if ranks == 1:
        return torch.arange(length)
    chunk = length // (2 * ranks)
    starts = (rank * chunk, (2 * ranks - 1 - rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk) for start in starts])


def order_of_gathered(ranks: int, length: int) -> Tensor:
    """Returns where each position stands in the ranks' parts laid end to end, int64 [length]."""
    return torch.cat([positions_of(r, ranks, length) for r in range(ranks)]).argsort()
