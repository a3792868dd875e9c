"""The objective on a GPU: the kernel against plain torch, sums and gradients against the CPU."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from autodeco.engines.base import HiddenBatch, OutputWeight
from autodeco.heads import closed_form
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums
from autodeco.heads.random import counter_uniform
from autodeco.heads.warp import nucleus_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("vocab", [17, 4096, 20_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 60.0])
def test_kernel_against_float64(vocab, dtype, scale):
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(64, vocab, generator=g) * scale + 5).to(dtype).cuda()
    t = torch.rand(64, generator=g).cuda() * 1.9 + 0.01
    peak = z.amax(-1, keepdim=True).float()
    work = closed_form.Workspace(64, vocab, dtype, z.device)
    assert work.kernel, "Triton should work on this machine"
    kw = {"features": True, "slopes": True, "base": True}
    got = closed_form.moments(z, peak, t, work, **kw)
    wide = closed_form.Workspace(64, vocab, torch.float64, torch.device("cpu"))
    want = closed_form.moments(z.double().cpu(), peak.double().cpu(), t.double().cpu(), wide, **kw)
    for f in dataclasses.fields(closed_form.Moments):
        a, b = getattr(got, f.name).double().cpu(), getattr(want, f.name)
        size = b.norm() + (1e-3 / vocab if "variance" in f.name else 1e-3)
        assert (a - b).norm() / size < 2e-5, f.name


@pytest.mark.parametrize("variant", sorted(OBJECTIVES))
@pytest.mark.parametrize("spread", [0.125, 1.0])
def test_sums_and_gradients_as_on_the_cpu(variant, spread):
    g = torch.Generator().manual_seed(0)
    m, d, vocab = 300, 64, 9001
    # A coarse grid: the products are exact, so that both machines see the same logits.
    h = (torch.randn(m, d, generator=g) * 2).round() / 2
    w = (torch.randn(vocab, d, generator=g) * 4).round() / 4 * spread
    y = torch.multinomial(torch.softmax(h @ w.T, -1), 1, generator=g)[:, 0]
    hidden = HiddenBatch(h, y, torch.arange(m) // 50, torch.arange(m) % 50)
    heads = DecodingHeads(HeadsConfig(d), torch.Generator().manual_seed(1))
    results = []
    for device in ("cpu", "cuda"):
        mine = copy.deepcopy(heads).to(device)
        batch = HiddenBatch(
            *(getattr(hidden, f.name).to(device) for f in dataclasses.fields(HiddenBatch))
        )
        sums = objective_sums(
            mine,
            batch,
            OutputWeight(w.to(device), 0, vocab),
            OBJECTIVES[variant],
            seed=1,
            epoch=0,
            backward=True,
            chunk_tokens=70,
        )
        results.append((sums, torch.cat([p.grad.flatten().cpu() for p in mine.parameters()])))
    (a, grad_a), (b, grad_b) = results
    assert (grad_a - grad_b).norm() / grad_a.norm() < 1e-4
    assert dataclasses.asdict(a) == pytest.approx(dataclasses.asdict(b), rel=1e-5)


def test_random_numbers_and_nucleus_are_those_of_the_cpu():
    index = torch.arange(10_000)
    assert torch.equal(counter_uniform(3, 1, index), counter_uniform(3, 1, index.cuda()).cpu())
    z = (torch.randn(200, 5000) * 3).round()
    t, p = torch.rand(200) + 0.3, torch.rand(200)
    here, there = nucleus_mask(z, t, p), nucleus_mask(z.cuda(), t.cuda(), p.cuda()).cpu()
    assert (here != there).sum() <= 2  # a sum that rounds the other way at the edge
