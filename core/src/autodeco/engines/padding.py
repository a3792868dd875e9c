"""Flat batches as padded matrices, for engines whose attention wants them so."""

from __future__ import annotations

import torch
from torch import Tensor

from autodeco.engines.base import TokenBatch
from autodeco.errors import NumericsError


def pad_batch(batch: TokenBatch | None, rows: int = 0, length: int = 0) -> tuple[Tensor, Tensor]:
    """Pads sequences with 0 on the right; causal attention alone keeps pads out.

    Args:
        batch: On the CPU; None: nothing but padding.
        rows: At least this many sequences; more are padding.
        length: At least this long.

    Returns:
        ids int64 [b, s], and where each flat token went in them, int64 [n].
    """
    if batch is None:
        return torch.zeros(rows, length, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    starts = batch.cu_seqlens[:-1].long()
    lengths = batch.cu_seqlens[1:].long() - starts
    rows, length = max(rows, len(lengths)), max(length, int(lengths.max()))
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    flat = row * length + batch.positions.cpu()
    ids = torch.zeros(rows * length, dtype=torch.int64)
    ids[flat] = batch.ids.cpu()
    return ids.view(rows, length), flat


def lay_end_to_end(batch: TokenBatch | None, length: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Lays sequences end to end in one row; padding is a last sequence of its own.

    Args:
        batch: On the CPU; None: nothing but padding.
        length: Of the row, at least the batch's tokens.

    Returns:
        ids int64 [1, length], where each flat token went in them, int64 [n], and where the
        sequences begin and the last one ends.
    """
    if batch is None:
        return (
            torch.zeros(1, length, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
            (0, length),
        )
    count = len(batch.ids)
    bounds = tuple(batch.cu_seqlens.tolist())
    ids = torch.zeros(1, length, dtype=torch.int64)
    ids[0, :count] = batch.ids.cpu()
    return ids, torch.arange(count), bounds if count == length else (*bounds, length)


def check_finite(h: Tensor, sample_id: Tensor, position: Tensor) -> None:
    """Refuses hidden states [m, d] that are not finite.

    Raises:
        NumericsError: One is not; the message names sample and token.
    """
    if not bool(torch.isfinite(h).all()):
        bad = int((~torch.isfinite(h).all(dim=1)).nonzero()[0])
        raise NumericsError(
            "a hidden state is not finite",
            where=f"sample {int(sample_id[bad])}, token {int(position[bad])}",
            fix="the backbone overflows in this dtype: try --dtype bfloat16 or float32",
        )
