"""Random tensors in the storage formats, and how their values are compared."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from autodeco.family import FamilySpec

QUANTIZED = ("gpt_oss", "deepseek_v3")


def family_of(name: str) -> FamilySpec:
    found: FamilySpec = import_module(f"autodeco_plugin_{name}.family").FAMILY
    return found


def demo(name: str) -> Path:
    return Path(str(import_module(f"autodeco_plugin_{name}").__file__)).parent / "demo"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two float32 tensors are alike to the bit, signs of zeros included; NaN is NaN."""
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    nan = torch.isnan(a)
    if not torch.equal(nan, torch.isnan(b)):
        return False
    bits = [t.contiguous().view(torch.int32)[~nan] for t in (a, b)]
    return torch.equal(*bits)


def random_fp8(
    rows: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random bytes without NaN, and scales whose blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    raw[(raw & 0x7F) == 0x7F] = 1
    blocks = (-(-rows // 128), -(-columns // 128))
    if dtype == torch.float8_e8m0fnu:
        scale = torch.randint(100, 150, blocks, generator=generator, dtype=torch.uint8).view(dtype)
    else:
        scale = (torch.rand(blocks, generator=generator) + 0.01).to(dtype)
    return {"weight": raw.view(torch.float8_e4m3fn), "scale": scale}


def random_mxfp4(shape: tuple[int, int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    experts, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    place = (experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*place, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 135, place, generator=generator, dtype=torch.uint8)
    return {"blocks": blocks, "scales": scales}


def same_bf16(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two bfloat16 tensors are alike to the bit; NaN is NaN."""
    assert a.dtype == b.dtype == torch.bfloat16 and a.shape == b.shape
    nan = torch.isnan(a)
    if not torch.equal(nan, torch.isnan(b)):
        return False
    return torch.equal(*(t.contiguous().view(torch.int16)[~nan] for t in (a, b)))
