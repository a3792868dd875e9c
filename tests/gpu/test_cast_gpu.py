"""A cast whose blocks are decoded on a GPU is that of the CPU, to the bit."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodeco.convert.casting import cast_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def same(one: Path, other: Path) -> None:
    mine, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, theirs[name])]
        if tensor.is_floating_point():
            keep = ~tensor.isnan().view(-1).repeat_interleave(tensor.element_size())
            assert torch.equal(tensor.isnan(), theirs[name].isnan())
            raw = [bytes_[keep] for bytes_ in raw]
        assert torch.equal(*raw), name


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_built_in_models(family: str, tmp_path: Path) -> None:
    package = Path(str(import_module(f"autodeco_plugin_{family}").__file__)).parent
    cast_checkpoint(package / "demo", tmp_path / "cpu")
    cast_checkpoint(package / "demo", tmp_path / "gpu", device="cuda")
    same(tmp_path / "cpu", tmp_path / "gpu")


def test_every_byte_at_scales_of_every_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 128 * 40
    every = torch.arange(256, dtype=torch.uint8).expand(rows, 256).contiguous()
    exponents = torch.randint(-149, 128, (40, 2), generator=generator)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(2, 1, 16)
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        "w": every.view(torch.float8_e4m3fn),
        "w_scale_inv": torch.ldexp(1 + torch.rand(40, 2, generator=generator), exponents),
        "e_blocks": blocks,
        "e_scales": scales,
    }
    save_file(tensors, source / "model.safetensors")
    config = {"architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    cast_checkpoint(source, tmp_path / "cpu")
    cast_checkpoint(source, tmp_path / "gpu", device="cuda")
    same(tmp_path / "cpu", tmp_path / "gpu")
