"""objective_sums: sums and head gradients against the eager form, drop, chunks, errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import eager_objective as eager
import pytest
import torch

from autodeco.engines.base import HiddenBatch, OutputWeight
from autodeco.errors import NumericsError
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, ObjectiveSums, objective_sums
from autodeco.heads.random import keep_mask

D, V, M = 16, 1500, 120
VARIANTS = sorted(OBJECTIVES)


def batch(seed=0, dtype=torch.float32, spread=1.0, vocab=V):
    """Hidden states and an output weight on a coarse grid: their product is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(M, D, generator=g) * 4).round() / 4
    w = (torch.randn(vocab, D, generator=g) * 4 * spread).round() / 4
    z = (h.to(dtype) @ w.to(dtype).T).double()
    y = torch.multinomial(torch.softmax(z, -1), 1, generator=g)[:, 0]
    y[::3] = eager.arg_max(z)[::3]
    y[1::5] = torch.randint(0, vocab, (len(y[1::5]),), generator=g)
    lengths = [50, 1, 0, 44, 25]
    sample = torch.arange(5).repeat_interleave(torch.tensor(lengths)) * 7
    index = torch.cat([torch.arange(n) for n in lengths]) + 3
    hidden = HiddenBatch(h.to(dtype), y, sample, index)
    return hidden, OutputWeight(w.to(dtype), 0, vocab), z


def heads_of(t_bias=0.0, p_bias=0.0, **kw):
    heads = DecodingHeads(HeadsConfig(D, **kw), torch.Generator().manual_seed(1))
    with torch.no_grad():
        if heads.temp_head is not None:
            heads.temp_head.mlp[2].bias.add_(t_bias)
        if heads.top_p_head is not None:
            heads.top_p_head.mlp[2].bias.add_(p_bias)
    return heads


def compare(heads, hidden, output, z, variant, drop=None, chunk=32):
    share = OBJECTIVES[variant].drop if drop is None else drop
    spared = keep_mask(5, 2, hidden.sample_id, hidden.token_index, share)
    state = {k: v.detach().double().requires_grad_() for k, v in heads.state_dict().items()}
    want = eager.objective(
        state,
        z,
        hidden.h.double(),
        hidden.label,
        hidden.sample_id,
        spared,
        variant,
        enhanced=heads.config.enhanced_features,
        heads=heads.config.heads,
    )
    heads.zero_grad()
    kw = {"seed": 5, "epoch": 2, "drop": drop, "chunk_tokens": chunk}
    got = objective_sums(heads, hidden, output, OBJECTIVES[variant], backward=True, **kw)
    flat = objective_sums(heads, hidden, output, OBJECTIVES[variant], backward=False, **kw)
    kept, tokens = int(want["keep"].sum()), len(z)
    for sums in (got, flat):
        assert sums.kept == kept and sums.tokens == tokens
        for name in ("temperature_loss", "top_p_loss"):
            assert getattr(sums, name) / tokens == pytest.approx(
                want[name].item() / tokens, rel=1e-5, abs=1e-5
            )
        assert sums.loss == pytest.approx(sums.temperature_loss + sums.top_p_loss)
        assert sums.normalizer == (4 if variant == "hf" else kept)
    assert flat.measured == tokens
    assert flat.nll / tokens == pytest.approx(float(want["nll"].sum()) / tokens, abs=1e-5, rel=1e-5)
    assert flat.outside_nucleus == got.outside_nucleus == int(want["outside"].sum())
    t, p = want["t"], want["p"]
    moments = (t.sum(), (t * t).sum(), p.sum(), (p * p).sum())
    names = ("temperature_sum", "temperature_square_sum", "top_p_sum", "top_p_square_sum")
    for name, value in zip(names, moments, strict=True):
        assert getattr(flat, name) == pytest.approx(float(value), rel=1e-5)

    total = want["temperature_loss"] + want["top_p_loss"]
    grads = torch.autograd.grad(total, list(state.values()), allow_unused=True)
    a = torch.cat(
        [
            (torch.zeros_like(s) if g is None else g).flatten()
            for s, g in zip(state.values(), grads, strict=True)
        ]
    )
    b = torch.cat(
        [(torch.zeros_like(q) if q.grad is None else q.grad).flatten() for q in heads.parameters()]
    )
    assert (a - b.double()).norm() / a.norm() < 1e-4
    return got


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("drop", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_gradients(variant, drop, dtype):
    hidden, output, z = batch(dtype=dtype)
    compare(heads_of(p_bias=2.0), hidden, output, z, variant, drop)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("t_bias,p_bias", [(-7, 0), (-5, 12), (9, 3), (0, -12), (0, 9), (-3, 1)])
def test_saturated_heads(variant, t_bias, p_bias):
    hidden, output, z = batch(seed=1)
    compare(heads_of(t_bias, p_bias), hidden, output, z, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", [0.0625, 4.0])
def test_flat_and_peaked_rows(variant, spread):
    hidden, output, z = batch(seed=2, spread=spread, vocab=6000)
    compare(heads_of(0.3, 1.5), hidden, output, z, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", ["temperature", "top-p"])
def test_one_head_alone(variant, heads):
    hidden, output, z = batch(seed=3)
    sums = (
        compare(heads_of(heads=heads), hidden, output, z, variant)
        if not (variant == "paper" and heads == "top-p")
        else compare(heads_of(heads=heads), hidden, output, z, variant, 0.0)
    )
    if heads == "top-p":
        assert sums.temperature_loss == 0 and sums.top_p_loss > 0
    elif variant != "paper":
        assert sums.top_p_loss == 0 and sums.temperature_loss > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_top_p_head(variant):
    hidden, output, z = batch(seed=4)
    compare(heads_of(enhanced_features=False), hidden, output, z, variant)


def test_paper_trains_a_lone_temperature_head():
    hidden, output, z = batch(seed=5)
    heads = heads_of(heads="temperature")
    compare(heads, hidden, output, z, "paper", 0.0)
    assert heads.temp_head.mlp[0].weight.grad.norm() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_result_does_not_depend_on_chunks_or_order(variant):
    hidden, output, _ = batch(seed=6)
    heads = heads_of()
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    shuffled = HiddenBatch(
        *(getattr(hidden, f.name)[order] for f in dataclasses.fields(HiddenBatch))
    )
    results = []
    for b, chunk in ((hidden, 7), (hidden, 1000), (shuffled, 33), (hidden, None)):
        heads.zero_grad()
        sums = objective_sums(
            heads,
            b,
            output,
            OBJECTIVES[variant],
            seed=1,
            epoch=0,
            backward=True,
            chunk_tokens=chunk,
        )
        results.append((sums, torch.cat([p.grad.flatten() for p in heads.parameters()])))
    for sums, grad in results[1:]:
        assert (grad - results[0][1]).norm() / grad.norm() < 1e-5
        for f in dataclasses.fields(ObjectiveSums):
            assert getattr(sums, f.name) == pytest.approx(getattr(results[0][0], f.name), rel=1e-5)


def test_same_call_gives_the_same_bits_and_adds_to_the_gradient():
    hidden, output, _ = batch(seed=7)
    heads = heads_of()
    kw = {"seed": 1, "epoch": 0, "backward": True, "chunk_tokens": 50}
    a = objective_sums(heads, hidden, output, OBJECTIVES["nll"], **kw)
    first = [p.grad.clone() for p in heads.parameters()]
    heads.zero_grad()
    assert objective_sums(heads, hidden, output, OBJECTIVES["nll"], **kw) == a
    assert all(torch.equal(p.grad, g) for p, g in zip(heads.parameters(), first, strict=True))
    objective_sums(heads, hidden, output, OBJECTIVES["nll"], **kw)
    for p, g in zip(heads.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_drop_takes_only_labels_that_are_the_arg_max_and_ties_are_no_exception():
    w = torch.zeros(10, D)
    w[3:5, 0] = 1.0  # tokens 3 and 4 tie for the first place: the arg-max is 3
    h = torch.zeros(3, D)
    h[:, 0] = 2.0
    hidden = HiddenBatch(h, torch.tensor([3, 4, 7]), torch.arange(3), torch.arange(3))
    sums = objective_sums(
        heads_of(),
        hidden,
        OutputWeight(w, 0, 10),
        OBJECTIVES["megatron"],
        seed=0,
        epoch=0,
        backward=True,
        drop=1.0,
    )
    assert (sums.tokens, sums.kept, sums.measured) == (3, 2, 2)


def test_everything_dropped_leaves_no_gradient():
    hidden, output, z = batch(seed=8)
    hidden = dataclasses.replace(hidden, label=eager.arg_max(z))
    heads = heads_of()
    sums = objective_sums(
        heads, hidden, output, OBJECTIVES["megatron"], seed=0, epoch=0, backward=True, drop=1.0
    )
    assert sums == dataclasses.replace(ObjectiveSums.zero(), tokens=M)
    assert all(p.grad is None for p in heads.parameters())


def test_no_tokens():
    hidden, output, _ = batch()
    empty = HiddenBatch(*(getattr(hidden, f.name)[:0] for f in dataclasses.fields(HiddenBatch)))
    sums = objective_sums(
        heads_of(), empty, output, OBJECTIVES["nll"], seed=0, epoch=0, backward=True
    )
    assert sums == ObjectiveSums.zero()


def test_sums_add_up():
    hidden, output, _ = batch(seed=9)
    heads = heads_of()
    kw = {"seed": 1, "epoch": 0, "backward": False}
    parts = [
        HiddenBatch(*(getattr(hidden, f.name)[s] for f in dataclasses.fields(HiddenBatch)))
        for s in (slice(0, 51), slice(51, M))
    ]
    for variant in VARIANTS:
        total = sum(
            (objective_sums(heads, b, output, OBJECTIVES[variant], **kw) for b in parts),
            ObjectiveSums.zero(),
        )
        whole = objective_sums(heads, hidden, output, OBJECTIVES[variant], **kw)
        for f in dataclasses.fields(ObjectiveSums):
            assert getattr(total, f.name) == pytest.approx(getattr(whole, f.name), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("variant", ["nll", "megatron"])
def test_not_finite_names_sample_and_token(value, variant):
    hidden, output, _ = batch(seed=10)
    h = hidden.h.clone()
    h[77] = value
    bad = dataclasses.replace(hidden, h=h)
    with pytest.raises(NumericsError) as error:
        objective_sums(
            heads_of(),
            bad,
            output,
            OBJECTIVES[variant],
            seed=0,
            epoch=0,
            backward=True,
            chunk_tokens=20,
        )
    sample, token = int(hidden.sample_id[77]), int(hidden.token_index[77])
    assert f"sample {sample}, token {token}" in str(error.value)


def test_diverged_heads_are_reported():
    hidden, output, _ = batch(seed=11)
    heads = heads_of()
    with torch.no_grad():
        heads.temp_head.mlp[2].bias.fill_(float("nan"))
    with pytest.raises(NumericsError):
        objective_sums(heads, hidden, output, OBJECTIVES["nll"], seed=0, epoch=0, backward=True)


def test_part_of_the_vocabulary_is_refused():
    hidden, output, _ = batch()
    part = OutputWeight(output.weight[: V // 2], 0, V)
    with pytest.raises(ValueError):
        objective_sums(heads_of(), hidden, part, OBJECTIVES["nll"], seed=0, epoch=0, backward=False)


PEAK = """
    import resource, sys, torch
    from autodeco.engines.base import HiddenBatch, OutputWeight
    from autodeco.heads.modules import DecodingHeads, HeadsConfig
    from autodeco.heads.objective import OBJECTIVES, objective_sums
    m, variant = int(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    d, vocab = 16, 20_000
    hidden = HiddenBatch(torch.randn(m, d), torch.randint(0, vocab, (m,)),
                         torch.zeros(m, dtype=torch.int64), torch.arange(m))
    output = OutputWeight(torch.randn(vocab, d), 0, vocab)
    heads = DecodingHeads(HeadsConfig(d))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objective_sums(heads, hidden, output, OBJECTIVES[variant], seed=0, epoch=0, backward=True)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("variant", ["nll", "hf"])
def test_peak_memory_does_not_grow_with_length(variant):
    """MiB that a step adds, in a process of its own; 400 MiB of logits at the longer length."""

    def peak(m):
        out = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), str(m), variant],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(out.stdout)

    short, long = peak(600), peak(5000)
    assert long < short + 40, (short, long)
