"""Heads on disk: every place that they are read from, and every way in which they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, save_tiny, save_tiny_heads, tiny_heads, tiny_model

from autodeco.errors import UsageError, WeightsError
from autodeco.heads.files import load_heads, save_heads
from autodeco.heads.identity import base_identity

PUBLISHED_NAMES = {
    f"{head}.mlp.{layer}.{kind}"
    for head in ("temp_head", "top_p_head")
    for layer in (0, 2)
    for kind in ("weight", "bias")
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("which", ["both", "temperature", "top-p"])
def test_round_trip(tmp_path: Path, which: str, enhanced: bool, dtype: str) -> None:
    heads = tiny_heads(which, enhanced)
    path = save_heads(tmp_path / "h", heads, metadata={"objective": "nll"}, dtype=dtype)
    loaded = load_heads(path)
    assert loaded.heads.config.heads == which
    if which != "temperature":
        assert loaded.heads.config.enhanced_features == enhanced
    assert loaded.dtype == dtype
    assert loaded.metadata["objective"] == "nll"
    assert loaded.metadata["temperature_scale"] == loaded.metadata["top_p_scale"] == 1.0
    for name, tensor in heads.state_dict().items():
        got = loaded.heads.state_dict()[name]
        assert got.dtype == torch.float32
        assert torch.equal(got, tensor.to(getattr(torch, dtype)).float())


def test_names_are_the_published_ones(tmp_path: Path) -> None:
    assert set(load_file(save_tiny_heads(tmp_path / "h") / "model.safetensors")) == PUBLISHED_NAMES


def test_config_has_published_keys_and_base(tmp_path: Path) -> None:
    base = save_tiny(tiny_model(), tmp_path / "base")
    config = json.loads((save_tiny_heads(tmp_path / "h", base) / "config.json").read_text())
    assert config["enable_temperature_head"] is config["enable_top_p_head"] is True
    assert config["use_enhanced_features"] is True
    assert config["base_model_type"] == "qwen3" and config["base_model_name_or_path"] == "base"
    assert config["base_config_sha256"] == base_identity(base)["base_config_sha256"]


def test_same_heads_same_bytes(tmp_path: Path) -> None:
    a, b = (save_tiny_heads(tmp_path / n) / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_bare_file(tmp_path: Path) -> None:
    path = save_tiny_heads(tmp_path / "h", enhanced=False) / "model.safetensors"
    loaded = load_heads(path)
    assert loaded.heads.config.hidden_size == HIDDEN
    assert not loaded.heads.config.enhanced_features


def test_published_directory(tmp_path: Path) -> None:
    state = {n: t.bfloat16() for n, t in tiny_heads().state_dict().items()}
    save_file(state, tmp_path / "autodeco_heads.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "autodeco",
                "base_model_type": "qwen3",
                "base_model_name_or_path": "Some/Model",
                "enable_temperature_head": True,
                "enable_top_p_head": True,
                "use_enhanced_features": True,
                "hidden_size": HIDDEN,
            }
        )
    )
    loaded = load_heads(tmp_path)
    assert loaded.metadata["base_model_name_or_path"] == "Some/Model"
    assert torch.equal(
        loaded.heads.state_dict()["temp_head.mlp.0.weight"], state["temp_head.mlp.0.weight"].float()
    )


def test_published_merged_reads_only_the_heads(tmp_path: Path) -> None:
    heads = tiny_heads().state_dict()
    save_file({"llm.model.x": torch.zeros(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file(
        {"llm.model.y": torch.zeros(4), **heads}, tmp_path / "model-00002-of-00002.safetensors"
    )
    table = {"llm.model.x": "model-00001-of-00002.safetensors"}
    table |= dict.fromkeys(["llm.model.y", *heads], "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()  # never needed for the heads
    loaded = load_heads(tmp_path)
    (names,) = loaded.weights.values()
    assert set(names) == PUBLISHED_NAMES


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(tiny_heads().state_dict(), tmp_path / "heads.pt")
    with pytest.raises(WeightsError, match="safetensors only"):
        load_heads(tmp_path / "heads.pt")


def _edit(path: Path, name: str, change: Any) -> None:
    state = load_file(path / "model.safetensors")
    new = change(state[name]) if name in state else change(None)
    state.pop(name, None)
    if new is not None:
        state[name] = new
    save_file(state, path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("temp_head.mlp.2.bias", lambda t: None, "temp_head.mlp.2.bias is missing"),
        ("top_p_head.mlp.0.weight", lambda t: None, "top_p_head.mlp.0.weight is missing"),
        ("temp_head.mlp.9.bias", lambda t: torch.zeros(1), "temp_head.mlp.9.bias is unknown"),
        ("lm_head.weight", lambda t: torch.zeros(1), "unknown tensor lm_head.weight"),
        ("temp_head.mlp.2.weight", lambda t: t[:, :9].contiguous(), "temp_head.mlp.2.weight has"),
        ("top_p_head.mlp.0.weight", lambda t: t[:, 2:].contiguous(), "top_p_head.mlp.0.weight has"),
        ("temp_head.mlp.0.weight", lambda t: t[0].contiguous(), "a matrix is expected"),
        ("temp_head.mlp.0.bias", lambda t: t.double(), "temp_head.mlp.0.bias has dtype"),
        ("top_p_head.mlp.2.bias", lambda t: t * float("nan"), "top_p_head.mlp.2.bias has values"),
    ],
)
def test_bad_tensor_is_named(tmp_path: Path, name: str, change: Any, message: str) -> None:
    path = save_tiny_heads(tmp_path / "h")
    _edit(path, name, change)
    with pytest.raises(WeightsError, match=message):
        load_heads(path)


@pytest.mark.parametrize("length", [0, 4, 100, 20_000])
def test_truncated_file(tmp_path: Path, length: int) -> None:
    file = save_tiny_heads(tmp_path / "h") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"safetensors header|its header says"):
        load_heads(file.parent)


def test_config_that_disagrees(tmp_path: Path) -> None:
    path = save_tiny_heads(tmp_path / "h")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "use_enhanced_features": False}))
    with pytest.raises(WeightsError, match="use_enhanced_features"):
        load_heads(path)


def test_index_may_not_leave_the_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"temp_head.mlp.0.weight": "../secret.safetensors"}})
    )
    with pytest.raises(WeightsError, match="outside the directory"):
        load_heads(tmp_path)


def test_no_heads(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no heads in this directory"):
        load_heads(tmp_path)
    with pytest.raises(WeightsError, match="no such heads"):
        load_heads(tmp_path / "nowhere")


def test_save_refuses_what_cannot_be_stored(tmp_path: Path) -> None:
    heads = tiny_heads()
    with pytest.raises(UsageError, match="unknown dtype"):
        save_heads(tmp_path / "h", heads, metadata={}, dtype="int8")
    with torch.no_grad():
        heads.temp_head.mlp[0].weight[0, 0] = 1e6  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match=r"temp_head.mlp.0.weight .* not finite"):
        save_heads(tmp_path / "h", heads, metadata={}, dtype="float16")
    assert not list(tmp_path.iterdir())
