"""Models with heads from every layout and family, and heads that lack a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, save_tiny, save_tiny_heads, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import autodeco.decoding
from autodeco.heads.files import load_heads
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


@pytest.mark.parametrize("layout", ["native", "autodeco"])
@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize(
    ("given", "attention", "positions"),
    [
        ({"attn_implementation": "eager"}, "eager", 300),
        ({"max_position_embeddings": 77}, "sdpa", 77),
        ({"max_position_embeddings": 77, "attn_implementation": "eager"}, "eager", 77),
        ({"config": {"max_position_embeddings": 77}}, "sdpa", 77),
    ],
)
def test_bug_overrides_of_the_config_were_lost_or_a_type_error(
    tmp_path: Path, layout: str, auto: bool, given: dict[str, Any], attention: str, positions: int
) -> None:
    stock = tiny_model(max_position_embeddings=300)
    base = save_tiny(stock, tmp_path / "base")
    merged = merge(base, save_tiny_heads(tmp_path / "heads", base), tmp_path / "m", layout=layout)
    if "config" in given:
        given = {"config": AutoConfig.from_pretrained(merged.path, **given["config"])}
    model = (AutoModelForCausalLM if auto else Model).from_pretrained(merged.path, **given)
    assert isinstance(model, type(stock)) and type(model.config) is type(stock.config)
    assert model.config._attn_implementation == attention
    assert model.config.max_position_embeddings == positions
    assert torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-4)


def test_a_config_of_the_base_model_is_taken_as_it_is(tmp_path: Path) -> None:
    base = save_tiny(tiny_model(), tmp_path / "base")
    merged = merge(base, save_tiny_heads(tmp_path / "h", base), tmp_path / "m", layout="autodeco")
    config = AutoConfig.from_pretrained(base, max_position_embeddings=77)
    model = Model.from_pretrained(merged.path, config=config, dtype=torch.bfloat16)
    assert (model.config.max_position_embeddings, model.dtype) == (77, torch.bfloat16)


def test_bug_a_lone_top_p_head_without_features_was_read_as_one_of_four_less(
    tmp_path: Path,
) -> None:
    """33 inputs are 28 and five, or 32 and one; the base has 32."""
    base = save_tiny(tiny_model(), tmp_path / "base")
    made = save_tiny_heads(tmp_path / "heads", base, heads="top-p", enhanced=False)
    lone = tmp_path / "lone.safetensors"
    save_file(load_file(made / "model.safetensors"), lone)
    assert load_heads(lone).heads.config.hidden_size == HIDDEN - 4  # nothing tells
    told = load_heads(lone, hidden_size=HIDDEN).heads.config
    assert (told.hidden_size, told.enhanced_features) == (HIDDEN, False)
    merged = merge(base, lone, tmp_path / "merged").path
    for model in (Model.from_pretrained(base, heads=lone), Model.from_pretrained(merged)):
        out = model.generate(IDS, max_new_tokens=3, return_autodeco=True)
        assert ((out.top_p > 0) & (out.top_p < 1)).all()
