"""The head modules: published names and shapes, float32, features, missing heads."""

from __future__ import annotations

import math

import pytest
import torch

from autodeco.errors import UsageError
from autodeco.heads.modules import DecodingHeads, HeadsConfig, distribution_features

D = 16


def _heads(**kw):
    return DecodingHeads(HeadsConfig(D, **kw), torch.Generator().manual_seed(0))


def test_published_names_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in _heads().state_dict().items()}
    assert shapes == {
        "temp_head.mlp.0.weight": (256, D),
        "temp_head.mlp.0.bias": (256,),
        "temp_head.mlp.2.weight": (1, 256),
        "temp_head.mlp.2.bias": (1,),
        "top_p_head.mlp.0.weight": (256, D + 5),
        "top_p_head.mlp.0.bias": (256,),
        "top_p_head.mlp.2.weight": (1, 256),
        "top_p_head.mlp.2.bias": (1,),
    }
    plain = _heads(enhanced_features=False).state_dict()
    assert tuple(plain["top_p_head.mlp.0.weight"].shape) == (256, D + 1)
    assert not [k for k in _heads(heads="temperature").state_dict() if k.startswith("top_p")]
    assert not [k for k in _heads(heads="top-p").state_dict() if k.startswith("temp")]


def test_unknown_heads_are_refused():
    with pytest.raises(UsageError):
        HeadsConfig(D, heads="top_p")


def test_initial_weights_come_from_the_generator_or_the_global_seed():
    a, b = _heads().state_dict(), _heads().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(5)
    c = DecodingHeads(HeadsConfig(D)).state_dict()
    torch.manual_seed(5)
    d = DecodingHeads(HeadsConfig(D)).state_dict()
    assert all(torch.equal(c[k], d[k]) for k in c)
    assert not torch.equal(a["temp_head.mlp.0.weight"], c["temp_head.mlp.0.weight"])


def test_parameters_stay_float32():
    heads = _heads()
    before = {k: v.clone() for k, v in heads.state_dict().items()}
    around = torch.nn.Sequential(heads).to(torch.bfloat16)
    around.half()
    for k, v in heads.state_dict().items():
        assert v.dtype == torch.float32 and torch.equal(v, before[k])


def test_bfloat16_states_are_read_in_float32_even_under_autocast():
    heads = _heads()
    h = torch.randn(4, D).to(torch.bfloat16)
    z = torch.randn(4, 50).to(torch.bfloat16)
    want = heads.predict(h.float(), z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = heads.predict(h, z)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and a.shape == (4,)
        assert torch.equal(a, b)
    t, p = want
    assert ((t > 0) & (t < 2)).all() and ((p > 0) & (p < 1)).all()


def test_a_missing_head_is_the_constant_one():
    h, z = torch.randn(3, D), torch.randn(3, 20)
    t, p = _heads(heads="temperature").predict(h, z)
    assert p.tolist() == [1, 1, 1] and t.tolist() != [1, 1, 1]
    t, p = _heads(heads="top-p").predict(h, z)
    assert t.tolist() == [1, 1, 1] and p.tolist() != [1, 1, 1]


def test_plain_top_p_head_ignores_the_features():
    heads = _heads(enhanced_features=False)
    h, t = torch.randn(3, D), torch.ones(3)
    want = heads.top_p(h, t, None)
    assert torch.equal(heads.top_p(h, t, torch.randn(3, 4)), want)
    with pytest.raises(ValueError):
        _heads().top_p(h, t, None)


def test_temperature_is_floored_without_gradient_below():
    heads = _heads()
    with torch.no_grad():
        heads.temp_head.mlp[2].bias.fill_(-40.0)
    t = heads.temperature(torch.randn(3, D))
    assert torch.equal(t, torch.full((3,), 1e-4))
    t.sum().backward()
    assert heads.temp_head.mlp[2].bias.grad.item() == 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_features_against_float64(scale, offset):
    z = torch.randn(6, 3000, generator=torch.Generator().manual_seed(2)) * scale + offset
    t = torch.tensor([1e-4, 0.05, 0.3, 1.0, 1.5, 2.0])
    p = torch.softmax(z.double() / t.double()[:, None], -1)
    entropy = torch.special.entr(p).sum(-1)
    want = torch.stack(
        (p.amax(-1), entropy, p.var(-1, correction=1), p.topk(5, -1).values.sum(-1)), -1
    )
    got = distribution_features(z, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


def test_features_of_a_tiny_vocabulary_and_of_ruled_out_tokens():
    z = torch.tensor([[1.0, 1.0, float("-inf")]])
    got = distribution_features(z, torch.ones(1))[0].tolist()
    assert got == pytest.approx([0.5, math.log(2), 1 / 12, 1.0])
