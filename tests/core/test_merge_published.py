"""What the published merge left, all in float16, loads and splits; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_heads, tiny_model

from autodeco.errors import WeightsError
from autodeco.heads.files import load_heads
from autodeco.heads.merge import merge, split
from autodeco.safetensors_header import read_checkpoint

INDEX = "model.safetensors.index.json"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def published_merge(directory: Path, heads_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A directory as the published merge leaves it; returns the backbone's tensors.

    Everything is cast to float16 and sharded by size, names sorted over all shards; config.json
    is that of the heads: the base's, the type replaced, the dtype of the training left in it.
    """
    model = tiny_model(dtype=torch.float16)
    model.save_pretrained(directory)
    backbone = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    heads = {n: t.to(heads_dtype) for n, t in tiny_heads().state_dict().items()}
    tensors = {**{"llm." + n: t for n, t in backbone.items()}, **heads}
    names, count = sorted(tensors), 3
    table = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, directory / file)  # without metadata, as the script does
        table |= dict.fromkeys(part, file)
    total = {"total_size": 1, "total_parameters": 2}
    index = {"metadata": total, "weight_map": table}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "architectures": ["AutoDecoModelForCausalLM"],
        "base_model_name_or_path": "someone/base",
        "base_model_type": config["model_type"],
        "dtype": "bfloat16",
        "enable_temperature_head": True,
        "enable_top_p_head": True,
        "model_type": "autodeco",
        "quantization_config": {"quant_method": "mxfp4"},
        "temperature_hidden_size": 32,
        "top_p_hidden_size": 32,
        "use_enhanced_features": True,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return backbone


@pytest.mark.parametrize("heads_dtype", [torch.float16, torch.float32])
def test_published_float16_shards_load_and_split(tmp_path: Path, heads_dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    backbone = published_merge(tmp_path / "p", heads_dtype)
    loaded = load_heads(tmp_path / "p")
    assert loaded.dtype == str(heads_dtype).removeprefix("torch.")
    assert loaded.metadata["base_model_name_or_path"] == "someone/base"
    out = split(tmp_path / "p", tmp_path / "h", base=tmp_path / "b")
    stored = load_file(out / "model.safetensors")
    for name, tensor in tiny_heads().state_dict().items():
        assert stored[name].dtype == heads_dtype
        assert torch.equal(stored[name], tensor.to(heads_dtype))
    infos = read_checkpoint(tmp_path / "b")
    assert infos.keys() == backbone.keys() and {i.dtype for i in infos.values()} == {"F16"}
    for shard in (tmp_path / "b").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, backbone[name])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "float16"
    assert not {"quantization_config", "top_p_hidden_size", "base_model_type"} & set(config)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = merge(tmp_path / "b", out, tmp_path / "again", layout="autodeco").path
    split(again, tmp_path / "h2", base=tmp_path / "b2")
    assert contents(tmp_path / "b2") == contents(tmp_path / "b")
    assert contents(tmp_path / "h2") == contents(out)


def test_split_refuses_what_belongs_to_no_part(tmp_path: Path) -> None:
    published_merge(tmp_path / "p", torch.float16)
    shard = tmp_path / "p" / "model-00001-of-00003.safetensors"
    save_file({**load_file(shard), "value_head.weight": torch.zeros(2)}, shard)
    index = json.loads((tmp_path / "p" / INDEX).read_text())
    index["weight_map"]["value_head.weight"] = shard.name
    (tmp_path / "p" / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"value_head\.weight"):
        split(tmp_path / "p", tmp_path / "h")
    assert not (tmp_path / "h").exists()
