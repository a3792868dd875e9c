"""The counter-based random drop: known answers, uniformity, independence of layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from autodeco.heads.random import counter_uniform, keep_mask

MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """splitmix64 in exact integers, from its authors' C code."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _reference(seed: int, *counters: int) -> float:
    state = _mix(seed & MASK)
    for counter in counters:
        state = _mix(state ^ (counter & MASK))
    return (state >> 11) * 2.0**-53


def test_known_answers_of_splitmix64():
    # The first outputs for seed 0, as published with the generator (prng.di.unimi.it).
    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    assert counter_uniform(0).item() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    assert counter_uniform(7, 1, 2, 3).item() == 0.10123025561781762 == _reference(7, 1, 2, 3)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_tensors_agree_with_exact_integers(seed):
    a = torch.tensor([0, 1, -1, 123456789012345, -(2**63), 2**63 - 1])
    b = torch.arange(3)
    got = counter_uniform(seed, 5, a[:, None], b)
    want = [[_reference(seed, 5, int(i), int(j)) for j in b] for i in a]
    assert got.dtype == torch.float64
    assert got.tolist() == want


@pytest.mark.parametrize("axis", ["token", "sample", "epoch", "seed"])
def test_uniform_along_every_counter(axis):
    n = 20_000
    if axis == "token":
        u = counter_uniform(3, 0, 17, torch.arange(n))
    elif axis == "sample":
        u = counter_uniform(3, 0, torch.arange(n), 17)
    elif axis == "epoch":
        u = counter_uniform(3, torch.arange(n), 17, 5)
    else:
        u = torch.stack([counter_uniform(s, 0, 1, 2) for s in range(2000)])
    values = u.numpy()
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = np.histogram2d(values[:-1], values[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_keep_mask_keeps_the_share_and_depends_on_seed_and_epoch():
    sample = torch.arange(100).repeat_interleave(200)
    token = torch.arange(200).repeat(100)
    mask = keep_mask(1, 0, sample, token, 0.6)
    assert mask.dtype == torch.bool
    assert mask.double().mean().item() == pytest.approx(0.4, abs=0.012)
    for other in (keep_mask(2, 0, sample, token, 0.6), keep_mask(1, 1, sample, token, 0.6)):
        assert (mask & other).double().mean().item() == pytest.approx(0.16, abs=0.012)
    assert keep_mask(1, 0, sample, token, 0.0).all()
    assert not keep_mask(1, 0, sample, token, 1.0).any()


def test_keep_mask_does_not_depend_on_order_or_batch_shape():
    sample = torch.arange(30).repeat_interleave(40)
    token = torch.arange(40).repeat(30)
    whole = keep_mask(9, 2, sample, token, 0.6)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_mask(9, 2, sample[order], token[order], 0.6), whole[order])
    parts = [keep_mask(9, 2, sample[i : i + 7], token[i : i + 7], 0.6) for i in range(0, 1200, 7)]
    assert torch.equal(torch.cat(parts), whole)
