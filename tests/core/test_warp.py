"""The warp: exact nucleus in the order (logit, then smaller id first)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco.heads import warp as warp_module
from autodeco.heads.warp import nucleus_mask, warp


def _reference(z, t, p):
    """Row by row in Python floats, straight from the definition."""
    keep = []
    for row, temperature, mass in zip(z.tolist(), t.tolist(), p.tolist(), strict=True):
        top = max(row)
        e = [math.exp((v - top) / max(temperature, 1e-4)) for v in row]
        total, before, kept = math.fsum(e), 0.0, set()
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if not kept or before / total < mass or mass >= 1:
                kept.add(i)
            before += e[i]
        keep.append([i in kept for i in range(len(row))])
    return torch.tensor(keep)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 2, 7, 40]),
    scale=st.sampled_from([0.0, 0.5, 4.0, 50.0]),
    offset=st.sampled_from([0.0, -1e3, 1e4]),
    width=st.sampled_from([3, 1024]),
    step=st.sampled_from([0.0, 0.5]),
)
def test_nucleus_is_the_definition(seed, vocab, scale, offset, width, step):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(6, vocab, generator=g) * scale + offset
    z = (z / step).round() * step if step else z  # a coarse grid makes ties
    t = torch.rand(6, generator=g) * 2
    p = torch.rand(6, generator=g)
    warp_module_head, warp_module._HEAD = warp_module._HEAD, width
    try:
        assert torch.equal(nucleus_mask(z, t, p), _reference(z, t, p))
    finally:
        warp_module._HEAD = warp_module_head


def test_ties_keep_the_smaller_ids():
    z = torch.tensor([[1.0, 3.0, 3.0, 3.0, 3.0, 1.0]])
    kept = nucleus_mask(z, torch.ones(1), torch.tensor([0.5]))
    assert kept.tolist() == [[False, True, True, True, False, False]]


def test_edges_of_p_and_t():
    z = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    t = torch.tensor([1.0, 1.0, 2.0, 1e-9, 0.7])
    p = torch.tensor([1.0, 0.0, 1.5, 0.9, 1 - 2**-24])
    kept = nucleus_mask(z, t, p).sum(-1)
    assert kept[0] == 3000 and kept[2] == 3000
    assert kept[1] == 1
    assert kept[3] == max(1, int((z[3] == z[3].max()).sum() * 0.9))
    assert 2990 <= kept[4] <= 3000
    assert nucleus_mask(z, t, p)[torch.arange(5), z.float().argmax(-1)].all()


def test_values_and_ruled_out_tokens():
    z = torch.tensor([[2.0, 1.0, float("-inf"), 0.0]], dtype=torch.bfloat16)
    out = warp(z, torch.tensor([0.5]), torch.tensor([1.0]))
    assert out.dtype == torch.float32
    assert out.tolist() == [[4.0, 2.0, float("-inf"), 0.0]]
    out = warp(z, torch.tensor([0.5]), torch.tensor([0.9]))
    assert out.tolist() == [[4.0, 2.0, float("-inf"), float("-inf")]]


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_large_flat_vocabulary_crosses_the_head(p):
    z = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1)) * 0.3
    t, mass = torch.tensor([0.5, 1.0, 2.0]), torch.full((3,), p)
    kept = nucleus_mask(z, t, mass)
    prob = torch.softmax(z.double() / t.double()[:, None], -1)
    inside = (prob * kept).sum(-1)
    smallest = torch.where(kept, prob, 2.0).amin(-1)
    assert (inside >= p - 1e-7).all()
    assert (inside - smallest < p + 1e-7).all()
