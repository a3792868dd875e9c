"""transformers' text-generation pipeline decodes with the heads, unless a user sets a parameter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, save_tiny_heads, tiny_model
from tokenizers_made import byte_bpe
from transformers import GenerationConfig, pipeline

import autodeco.decoding
from autodeco.decoding.hooks import _said
from autodeco.heads.merge import merge
from autodeco.heads.modules import DecodingHeads

Model = autodeco.decoding.AutoDecoModelForCausalLM
ASKED = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    stock = tiny_model(vocab_size=len(byte_bpe()))
    base = save_tiny(stock, root / "base", vendor={"do_sample": True, "temperature": 0.6})
    return merge(base, save_tiny_heads(root / "heads", base), root / "merged").path


@pytest.fixture
def model(merged: Path) -> Any:
    return Model.from_pretrained(merged)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every use of the heads."""
    found: list[int] = []
    predict = DecodingHeads.predict

    def counted(self: DecodingHeads, *args: Any) -> Any:
        found.append(1)
        return predict(self, *args)

    monkeypatch.setattr(DecodingHeads, "predict", counted)
    return found


def test_bug_a_pipeline_switched_the_heads_off(model: Any, calls: list[int]) -> None:
    """Its default temperature of 0.7 was taken for a user's choice."""
    asker = pipeline("text-generation", model=model, tokenizer=byte_bpe())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        asker("abc", **ASKED)
        asker("abc", generation_config=GenerationConfig(max_new_tokens=4))
    assert len(calls) == 8 + 4


@pytest.mark.parametrize("value", [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}])
def test_what_is_given_to_a_pipeline_itself_switches_the_heads_off(
    model: Any, calls: list[int], value: dict[str, Any]
) -> None:
    asker = pipeline("text-generation", model=model, tokenizer=byte_bpe())
    asker("abc", **ASKED, **value)
    asker("abc", generation_config=GenerationConfig(max_new_tokens=4, do_sample=True, **value))
    pipeline("text-generation", model=model, tokenizer=byte_bpe(), **value)("abc", **ASKED)
    asker("abc", **ASKED, do_sample=False)
    assert calls == []
    asker("abc", **ASKED)
    assert len(calls) == 8


def test_bug_defaults_prepared_outside_of_generate_were_taken_for_a_users_choice(
    model: Any, calls: list[int]
) -> None:
    """Pipelines of transformers before 5.2x ask the model to complete their own default config."""
    own = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=256)
    config, left = model._prepare_generation_config(generation_config=own, max_new_tokens=3, a=1)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (None,) * 4
    assert (config.max_new_tokens, left) == (3, {"a": 1}) and own.temperature == 0.7
    model.generate(torch.arange(5, 9)[None], generation_config=config)
    assert len(calls) == 3
    config, _ = model._prepare_generation_config(generation_config=own, temperature=0.4)
    assert (config.temperature, config.top_k) == (0.4, None)
    model.generate(torch.arange(5, 9)[None], generation_config=config, max_new_tokens=3)
    assert len(calls) == 3


def test_bug_heads_that_a_sampling_parameter_switched_off_were_off_silently(model: Any) -> None:
    ids = torch.arange(5, 9)[None]
    _said().clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for quiet in ({}, {"autodeco": False}, {"do_sample": False}, {"temperature": 1.0}):
            model.generate(ids, max_new_tokens=2, **quiet)
    with pytest.warns(UserWarning, match=r"top_p=0\.9 was set explicitly") as caught:
        model.generate(ids, max_new_tokens=2, top_p=0.9)
        model.generate(ids, max_new_tokens=2, top_p=0.8)  # said once in a process
    ours = [one for one in caught if "AutoDeco" in str(one.message)]
    assert len(ours) == 1 and ours[0].filename == __file__
    assert "temperature_scale" in str(ours[0].message)
