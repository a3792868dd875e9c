"""Merge and split: bytes of the base, both layouts, the inverse, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_heads, tiny_heads, tiny_model
from transformers import AutoModelForCausalLM

from autodeco.errors import AutodecoError, EnvironmentProblem, UsageError, WeightsError
from autodeco.heads.files import load_heads
from autodeco.heads.merge import merge, split

IDS = torch.arange(5, 17).view(2, 6)
VENDOR = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}


@pytest.fixture(params=["one file", "shards"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    shard = "12KB" if request.param == "shards" else "5GB"
    return save_tiny(model, tmp_path / "base", shard, VENDOR)


@pytest.fixture
def heads(base: Path, tmp_path: Path) -> Path:
    return save_tiny_heads(tmp_path / "heads", base)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def same_file_bytes(a: Path, b: Path, names: list[str]) -> None:
    assert names
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_native_keeps_every_base_byte(base: Path, heads: Path, tmp_path: Path) -> None:
    before = bytes_of(base)
    report = merge(base, heads, tmp_path / "m")
    assert bytes_of(base) == before
    changed = {"config.json", "generation_config.json"}
    same_file_bytes(base, report.path, [n for n in before if n not in changed])
    same_file_bytes(heads, report.path / "autodeco", ["config.json", "model.safetensors"])
    shards = [n for n in before if n.endswith(".safetensors")]
    assert (report.linked, report.reflinked, report.copied) == (len(shards), 0, 0)
    assert f"{len(shards)} hard-linked" in report.describe()
    for name in shards:
        assert (base / name).stat().st_ino == (report.path / name).stat().st_ino
    assert (base / "tokenizer_config.json").stat().st_nlink == 1  # an edit must not reach the base


def test_native_loads_as_the_base_model(base: Path, heads: Path, tmp_path: Path) -> None:
    path = merge(base, heads, tmp_path / "m").path
    a = AutoModelForCausalLM.from_pretrained(base)
    b, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert type(b).__name__ == "Qwen3ForCausalLM" and b.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(a(IDS).logits, b(IDS).logits)


def test_without_links_nothing_is_copied_unless_asked(
    base: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = merge(base, heads, tmp_path / "asked", copy=True)
    assert asked.copied > 0 == asked.linked
    monkeypatch.setattr(os, "link", _no_link)
    monkeypatch.setattr("autodeco.copying.reflink", lambda *_: False)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    with pytest.raises(EnvironmentProblem, match=f"{size:,} bytes") as refused:
        merge(base, heads, tmp_path / "forced")
    assert str(base) in str(refused.value) and "--copy" in str(refused.value)
    assert not list(tmp_path.glob("*forced*")) and not list(tmp_path.glob(".autodeco*"))
    forced = merge(base, heads, tmp_path / "forced", copy=None)  # a built-in model
    assert forced.copied == asked.copied and forced.linked == 0 and forced.bytes_written >= size
    for name in ("asked", "forced"):
        same_file_bytes(base, tmp_path / name, [p.name for p in base.glob("*.safetensors")])


def _no_link(*_: Any, **__: Any) -> None:
    raise OSError("no links here")


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_generation_config(base: Path, heads: Path, tmp_path: Path, layout: str) -> None:
    path = merge(base, heads, tmp_path / "m", layout=layout).path
    written = json.loads((path / "generation_config.json").read_text())
    assert written["do_sample"] is True and not {"temperature", "top_p", "top_k"} & set(written)
    assert written["pad_token_id"] == 0
    assert json.loads((path / "config.json").read_text())["autodeco"]["generation_config"] == VENDOR


def test_without_generation_config_the_special_tokens_stay(
    base: Path, heads: Path, tmp_path: Path
) -> None:
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, 6]}))
    path = merge(base, heads, tmp_path / "m").path
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [5, 6]
    restored = tmp_path / "b"
    split(path, tmp_path / "h", base=restored)
    assert not (restored / "generation_config.json").exists()


def test_symlinks_are_resolved(base: Path, heads: Path, tmp_path: Path) -> None:
    cache, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.move(base, cache)
    snapshot.mkdir()
    for file in cache.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    path = merge(snapshot, heads, tmp_path / "m").path
    assert not any(p.is_symlink() for p in path.rglob("*"))
    shutil.rmtree(snapshot)
    assert AutoModelForCausalLM.from_pretrained(path)(IDS).logits.isfinite().all()


def test_autodeco_layout(base: Path, heads: Path, tmp_path: Path) -> None:
    path = merge(base, heads, tmp_path / "m", layout="autodeco").path
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "autodeco" and config["base_model_type"] == "qwen3"
    assert config["architectures"] == ["AutoDecoModelForCausalLM"]
    assert config["base_architectures"] == ["Qwen3ForCausalLM"]
    table = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {n: t for s in set(table.values()) for n, t in load_file(path / s).items()}
    assert set(stored) == set(table)
    for file in base.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            got = stored.pop("llm." + name)
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    assert set(stored) == set(tiny_heads().state_dict())
    assert not (path / "model.safetensors").exists()  # it would win over the index


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_split_is_the_inverse(base: Path, tmp_path: Path, layout: str, dtype: str) -> None:
    heads = save_tiny_heads(tmp_path / "heads", base, dtype=dtype)
    path = merge(base, heads, tmp_path / "m", layout=layout).path
    out = split(path, tmp_path / "h", base=tmp_path / "b")
    assert bytes_of(out) == bytes_of(heads)
    before, after = bytes_of(base), bytes_of(tmp_path / "b")
    assert set(before) == set(after)
    for name in before:
        if name.endswith(".json"):
            a, b = json.loads(before[name]), json.loads(after[name])
            if name.endswith("index.json"):
                a, b = a["weight_map"], b["weight_map"]
            assert a == b, name
        else:
            a, b = load_file(base / name), load_file(tmp_path / "b" / name)
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_split_of_a_published_merge(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float16)
    merged = tmp_path / "published"
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.save_pretrained(merged)
    expected = AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
    state = {"llm." + n: t for n, t in load_file(merged / "model.safetensors").items()}
    heads = {n: t.half() for n, t in tiny_heads().state_dict().items()}
    save_file({**state, **heads}, merged / "model.safetensors")
    config = json.loads((merged / "config.json").read_text())
    config |= {"model_type": "autodeco", "base_model_type": "qwen3"}
    config |= {"architectures": ["AutoDecoModelForCausalLM"], "use_enhanced_features": True}
    (merged / "config.json").write_text(json.dumps(config))
    out = split(merged, tmp_path / "h", base=tmp_path / "b")
    got = load_file(out / "model.safetensors")
    assert all(torch.equal(got[n], heads[n]) for n in heads) and got.keys() == heads.keys()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(back(IDS).logits, expected)


def test_bare_published_file_merges(base: Path, tmp_path: Path) -> None:
    file = save_tiny_heads(tmp_path / "h") / "model.safetensors"
    shutil.copy(file, tmp_path / "autodeco_heads.safetensors")
    path = merge(base, tmp_path / "autodeco_heads.safetensors", tmp_path / "m").path
    loaded = load_heads(path)
    assert loaded.metadata["base_model_type"] == "qwen3"
    assert (path / "autodeco" / "model.safetensors").read_bytes() == file.read_bytes()


def test_refusals(base: Path, heads: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    cases: list[tuple[type[AutodecoError], str, Any]] = [
        (UsageError, "unknown layout", lambda: merge(base, heads, tmp_path / "m", layout="x")),
        (UsageError, "exists already", lambda: merge(base, heads, tmp_path / "there")),
        (UsageError, "within one another", lambda: merge(base, heads, base / "m")),
        (WeightsError, "no such base", lambda: merge(tmp_path / "no", heads, tmp_path / "m")),
        (WeightsError, "no such heads", lambda: merge(base, tmp_path / "no", tmp_path / "m")),
        (WeightsError, "no heads", lambda: split(base, tmp_path / "h")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert not (tmp_path / "m").exists()


def test_heads_of_another_model(base: Path, heads: Path, tmp_path: Path) -> None:
    other = save_tiny(tiny_model(num_hidden_layers=3), tmp_path / "deeper")
    wider = save_tiny(tiny_model(hidden_size=64), tmp_path / "wider")
    for model, key in ((other, "base_config_sha256"), (wider, "hidden_size")):
        with pytest.raises(WeightsError, match=key):
            merge(model, heads, tmp_path / "m")


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_merged_base_is_refused(base: Path, heads: Path, tmp_path: Path, layout: str) -> None:
    path = merge(base, heads, tmp_path / "m", layout=layout).path
    with pytest.raises(WeightsError, match="merged checkpoint already"):
        merge(path, heads, tmp_path / "twice")


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_missing_and_truncated_shard(base: Path, heads: Path, tmp_path: Path, layout: str) -> None:
    shard = sorted(base.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(WeightsError, match=r"safetensors header|its header says"):
        merge(base, heads, tmp_path / "m", layout=layout)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"missing|is there"):
        merge(base, heads, tmp_path / "m", layout=layout)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_a_failure_leaves_nothing(
    base: Path, heads: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(base)
    full = OSError(28, "No space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(AutodecoError, match="No space left"):
        merge(base, heads, tmp_path / "m", layout=layout)
    assert bytes_of(base) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "heads"]
