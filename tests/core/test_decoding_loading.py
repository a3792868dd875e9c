"""Models with heads from every layout and family, and heads that lack a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny, save_tiny_heads, tiny_model

import autodeco.decoding
from autodeco.heads.merge import merge

Model = autodeco.decoding.AutoDecoModelForCausalLM
IDS = torch.arange(5, 25).view(2, 10)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("layout", ["native", "autodeco", "base and heads"])
def test_loads_and_greedy_is_untouched(tmp_path: Path, family: str, layout: str) -> None:
    stock = tiny_model(family)
    base = save_tiny(stock, tmp_path / "base", "15KB")
    heads = save_tiny_heads(tmp_path / "heads", base)
    if layout == "base and heads":
        model = Model.from_pretrained(base, heads=heads)
    else:
        model = Model.from_pretrained(merge(base, heads, tmp_path / "m", layout=layout).path)
    assert isinstance(model, Model) and isinstance(model, type(stock))
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        a = model.generate(IDS, max_new_tokens=8, **settings)
        assert torch.equal(a, stock.generate(IDS, max_new_tokens=8, **settings))
    out = model.generate(IDS, max_new_tokens=4, return_autodeco=True)
    assert out.temperature.shape == out.top_p.shape == (2, 4)


@pytest.mark.parametrize(
    ("which", "attribute"), [("temperature", "top_p"), ("top-p", "temperature")]
)
def test_missing_head_is_one(tmp_path: Path, which: str, attribute: str) -> None:
    base = save_tiny(tiny_model(), tmp_path / "base")
    heads = save_tiny_heads(tmp_path / "heads", base, heads=which)
    for layout in ("native", "autodeco"):
        path = merge(base, heads, tmp_path / layout, layout=layout).path
        out = Model.from_pretrained(path).generate(IDS, max_new_tokens=5, return_autodeco=True)
        assert (out[attribute] == 1).all()
        other = {"top_p": "temperature", "temperature": "top_p"}[attribute]
        assert (out[other] != 1).all()


def test_plain_features_decode(tmp_path: Path) -> None:
    base = save_tiny(tiny_model(), tmp_path / "base")
    heads = save_tiny_heads(tmp_path / "heads", base, enhanced=False)
    model = Model.from_pretrained(base, heads=heads)
    out = model.generate(IDS, max_new_tokens=5, return_autodeco=True)
    assert ((out.top_p > 0) & (out.top_p < 1)).all()
