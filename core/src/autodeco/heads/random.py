"""Counter-based random numbers: a pure function of a seed and integer counters.

Nothing is drawn from a stream, so a number depends neither on the order in which tokens are
visited nor on rank, packing or device: integers are hashed with splitmix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose 64-bit wrap-around
arithmetic is the same on CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The 64 bits of ``value`` read as a signed integer, as torch.int64 holds them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's ``>>`` copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """One output of splitmix64 from the state ``x`` (int64, any shape)."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def counter_uniform(seed: int, *counters: Tensor | int) -> Tensor:
    """Uniform numbers that are a function of ``seed`` and ``counters`` alone.

    Args:
        seed: any integer; its low 64 bits count.
        counters: integers or int64 tensors, broadcast together. Their order matters.

    Returns:
        float64 in [0, 1), a multiple of 2**-53, with the broadcast shape, on the tensors' device.
    """
    device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    state = _splitmix64(torch.tensor(_signed(seed), dtype=torch.int64, device=device))
    for counter in counters:
        word = counter.to(torch.int64) if isinstance(counter, Tensor) else _signed(counter)
        state = _splitmix64(state ^ word)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


def keep_mask(seed: int, epoch: int, sample_id: Tensor, token_index: Tensor, drop: float) -> Tensor:
    """Which tokens the random drop spares, were their arg-max the label.

    Args:
        seed: the job's seed.
        epoch: the pass over the data, so that each pass drops other tokens.
        sample_id: int64 [m], the sample's id in its file.
        token_index: int64 [m], the position in the sample whose hidden state predicts the label.
        drop: the share to drop, in [0, 1].

    Returns:
        bool [m], True = kept. Independent of rank, packing, batch shape and device.
    """
    return counter_uniform(seed, epoch, sample_id, token_index) >= drop
