"""Closed form in float32 against float64 autograd, token by token, at given T and P."""

from __future__ import annotations

import eager_objective as eager
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco.heads import closed_form, losses, soft_mask
from autodeco.heads.modules import distribution_features
from autodeco.heads.objective import OBJECTIVES
from autodeco.heads.warp import nucleus_mask

TEMPERATURES = (1.1e-4, 1e-3, 0.009, 0.05, 0.3, 1.0, 1.7, 1.9999998)
TOP_PS = (0.0, 1e-6, 0.1037, 0.5021, 0.9013, 0.9903, 0.999999, 1.0)
N = 128


def logits_of(kind, vocab, generator):
    z = torch.randn(N, vocab, generator=generator)
    if kind == "offset":
        return z * 3 + 1000
    if kind == "ties":
        return (z * 4).to(torch.bfloat16).float()
    if kind == "coarse ties":
        return (z * 2).round()
    if kind == "dominated":
        z[torch.arange(N), torch.randint(0, vocab, (N,), generator=generator)] += 80
        return z * 3
    return z * {"equal": 0.0, "flat": 0.2, "usual": 3.0, "peaked": 8.0}[kind]


KINDS = (
    "equal",
    "flat",
    "usual",
    "peaked",
    "offset",
    "ties",
    "coarse ties",
    "dominated",
)


def labels_of(z, generator):
    """Drawn from the model, with a quarter arg-max and a quarter anywhere (the tail included)."""
    y = torch.multinomial(torch.softmax(z, -1), 1, generator=generator)[:, 0]
    y[::4] = eager.arg_max(z)[::4]
    y[1::4] = torch.randint(0, z.shape[-1], (len(y[1::4]),), generator=generator)
    return y


def closed(z, y, t, p, variant):
    objective = OBJECTIVES[variant]
    work = closed_form.Workspace(len(z), z.shape[-1], z.dtype, z.device)
    kw = {"features": True, "slopes": True, "mass": True, "base": True}
    # Two blocks, so that joining them is part of what is tested.
    parts = [losses.see(*(v[s] for v in (z, y, t)), work, **kw) for s in (slice(50), slice(50, N))]
    seen = losses.join(parts)
    features = closed_form.features(seen.order, seen.at, 5)
    terms = losses.token_terms(
        seen,
        p,
        soft_mask.Look(lambda rows: z[rows], 50, work),
        objective,
        with_temperature=objective.temperature_term,
        with_top_p=True,
    )
    return terms, features


@pytest.fixture
def narrow(monkeypatch):
    """Start from few of the largest logits, so that small vocabularies have tails."""

    def set_width(width, *wider):
        monkeypatch.setattr(soft_mask, "WIDTHS", (width, *wider))
        monkeypatch.setattr(losses, "first_width", lambda vocab: min(width, vocab))

    return set_width


def check(z, y, t, p, variant, dtype=torch.float32, tolerance=1.0):
    """Losses within 1e-5 (of themselves where they exceed 1), derivatives within 1e-4."""
    tt, pp = t.double().requires_grad_(), p.double().requires_grad_()
    loss_t, loss_p, nll, outside = eager.token_losses(z.double(), y, tt, pp, variant)
    terms, _ = closed(z.to(dtype), y, t.to(dtype), p.to(dtype), variant)

    def slope(loss, x):
        if not loss.requires_grad:
            return torch.zeros_like(x)
        return torch.autograd.grad(loss.sum(), x, retain_graph=True, allow_unused=True)[0]

    def loss_close(got, want):
        error = (got.double() - want).abs() / want.abs().clamp_min(1.0)
        assert error.max() < 1e-5 * tolerance, error.max()

    def slope_close(got, want, scale):
        # As the head sees it, through its sigmoid: dT = T (2 - T) / 2, dP = P (1 - P).
        error = (got.double() - want) * scale
        # A gradient is of order 1 a token: what is a hundredth of it counts in absolute terms.
        size = (want * scale).norm() + 1e-2 * len(want) ** 0.5
        assert error.norm() / size < 1e-4 * tolerance, error.norm() / size

    t_scale, p_scale = t.double() * (2 - t.double()) / 2, p.double() * (1 - p.double())
    # Just at a kink of c = P the two precisions may stand on different sides.
    at_label = terms.top_p
    loss_close(terms.nll, nll)
    loss_close(at_label[0], loss_p.detach())
    slope_close(at_label[1], slope(loss_p, tt), t_scale)
    slope_close(at_label[2], slope(loss_p, pp), p_scale)
    if variant == "paper":
        assert terms.temperature is None
    else:
        loss_close(terms.temperature[0], loss_t.detach())
        slope_close(terms.temperature[1], slope(loss_t, tt), t_scale)
    assert torch.equal(terms.outside, outside)


@pytest.mark.parametrize("variant", sorted(OBJECTIVES))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 5000])
def test_edges_of_t_and_p(variant, kind, width, narrow):
    narrow(width, 512)
    g = torch.Generator().manual_seed(7)
    z = logits_of(kind, 5000, g)
    t = torch.tensor(TEMPERATURES)[torch.arange(N) % 8]
    p = torch.tensor(TOP_PS)[torch.arange(N) // 8 % 8]
    check(z, labels_of(z, g), t, p, variant)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    vocab=st.sampled_from([5, 6, 33, 300, 1400]),
    width=st.sampled_from([5, 40, 256]),
    variant=st.sampled_from(sorted(OBJECTIVES)),
)
def test_random_inputs(seed, kind, vocab, width, variant):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_mask, "WIDTHS", (width,))
        patch.setattr(losses, "first_width", lambda vocab: min(width, vocab))
        _random_inputs(seed, kind, vocab, variant)


def _random_inputs(seed, kind, vocab, variant):
    g = torch.Generator().manual_seed(seed)
    z = logits_of(kind, vocab, g)
    t = torch.rand(N, generator=g) * 1.9 + 0.05
    p = torch.rand(N, generator=g)
    # At c = P the derivative has a kink, and rounding chooses the side: stand away from it.
    c = torch.softmax(z.double() / t.double()[:, None], -1).sort(descending=True).values.cumsum(-1)
    for _ in range(20):
        p = torch.where((c - p[:, None]).abs().amin(-1) < 2e-6, p - 3e-6, p).clamp_min(0.0)
    check(z, labels_of(z, g), t, p, variant)


@pytest.mark.parametrize("kind", ["usual", "ties", "dominated"])
def test_float64_run_is_much_closer(kind, narrow):
    narrow(900)
    g = torch.Generator().manual_seed(3)
    z = logits_of(kind, 900, g)
    t, p = torch.rand(N, generator=g) + 0.3, torch.rand(N, generator=g)
    check(z, labels_of(z, g), t, p, "nll", dtype=torch.float64, tolerance=1e-5)


def test_bfloat16_logits_are_read_exactly():
    g = torch.Generator().manual_seed(4)
    z = logits_of("ties", 3000, g)
    y, t, p = labels_of(z, g), torch.rand(N, generator=g) + 0.3, torch.rand(N, generator=g)
    a, _ = closed(z, y, t, p, "megatron")
    b, _ = closed(z.to(torch.bfloat16), y, t, p, "megatron")
    for i in range(3):
        torch.testing.assert_close(a.top_p[i], b.top_p[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_their_slopes(kind):
    g = torch.Generator().manual_seed(5)
    z = logits_of(kind, 2000, g)
    t = torch.tensor(TEMPERATURES)[torch.arange(N) % 8]
    tt = t.double().requires_grad_()
    want = eager.features(z.double(), tt)
    _, (values, slopes) = closed(z, labels_of(z, g), t, torch.full((N,), 0.5), "nll")
    torch.testing.assert_close(values.double(), want.detach(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(values, distribution_features(z, t), rtol=1e-5, atol=2e-6)
    for i in range(4):
        slope = torch.autograd.grad(want[:, i].sum(), tt, retain_graph=True)[0]
        error = (slopes[:, i].double() - slope) * t
        assert error.norm() / ((slope * t).norm() + 1e-6) < 1e-4


@pytest.mark.parametrize("vocab,k", [(1600, 10), (1603, 20), (50, 50), (40, 7)])
def test_largest_is_the_multiset_of_topk(vocab, k):
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(20, vocab, generator=g) * 3).round()
    values, ids = closed_form.largest(z, k)
    assert torch.equal(values, z.sort(descending=True).values[:, :k])
    assert torch.equal(z.gather(-1, ids), values)
    for row in ids.tolist():
        assert len(set(row)) == k


def test_coarse_rows_are_done_again(narrow, monkeypatch):
    """A flat row with a narrow head and no wider one would be off; with the guard it is exact."""
    narrow(16)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, 5000, generator=g) * 2.5
    y = labels_of(z, g)
    t, p = torch.full((N,), 1.5), torch.rand(N, generator=g)
    check(z, y, t, p, "nll")
    monkeypatch.setattr(soft_mask, "TAIL_TOLERANCE", 1.0)
    with pytest.raises(AssertionError):
        check(z, y, t, p, "nll")


def test_outside_agrees_with_the_warp(narrow):
    narrow(64, 512)
    g = torch.Generator().manual_seed(6)
    for kind in KINDS:
        z = logits_of(kind, 3000, g)
        y = labels_of(z, g)
        t, p = torch.rand(N, generator=g) * 2 + 1e-3, torch.rand(N, generator=g)
        terms, _ = closed(z, y, t, p, "megatron")
        inside = nucleus_mask(z, t, p)[torch.arange(N), y]
        assert torch.equal(terms.outside, ~inside), kind
