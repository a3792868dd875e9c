"""The fast decoders give, to the bit, the float32 values of the specifications, rounded once."""

from __future__ import annotations

import pytest
import torch
from format_tools import random_fp8, random_mxfp4, same_bf16

from autodeco.convert.formats import decode_fp8_blocks, decode_mxfp4
from autodeco.convert.rounding import round_fp8_blocks, round_mxfp4


@pytest.mark.parametrize("size", [(128, 128), (130, 259), (1, 1), (127, 128), (300, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_of_any_size(size: tuple[int, int], dtype: torch.dtype) -> None:
    parts = random_fp8(*size, dtype)
    before = parts["weight"].clone()
    assert same_bf16(round_fp8_blocks(parts), decode_fp8_blocks(parts).bfloat16())
    assert torch.equal(parts["weight"].view(torch.uint8), before.view(torch.uint8))


def test_every_fp8_byte_at_scales_of_every_size() -> None:
    # products that underflow, are subnormal, round to even either way, and overflow
    generator = torch.Generator().manual_seed(0)
    rows = 128 * 40
    every = torch.arange(256, dtype=torch.uint8).expand(rows, 256).contiguous()
    exponents = torch.randint(-149, 128, (40, 2), generator=generator)
    scale = torch.ldexp(1 + torch.rand(40, 2, generator=generator), exponents)
    scale[0] = torch.tensor([float("inf"), float("nan")])
    scale[1] = torch.tensor([0.0, -1.5])
    parts = {"weight": every.view(torch.float8_e4m3fn), "scale": scale}
    expected = decode_fp8_blocks(parts).bfloat16()
    assert expected.isinf().any() and (expected == 0).any() and expected.isnan().any()
    assert same_bf16(round_fp8_blocks(parts), expected)


def test_rounding_once_differs_from_rounding_twice() -> None:
    # 15/8 * (1 + 2**-8 + 2**-20): a scale rounded to bfloat16 first gives another product
    weight = torch.tensor([[15 / 8]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1 + 2**-8 + 2**-20]])
    twice = weight.bfloat16() * scale.bfloat16()
    once = round_fp8_blocks({"weight": weight, "scale": scale})
    assert once != twice and once == (weight.float() * scale).bfloat16()


@pytest.mark.parametrize("shape", [(1, 32, 1), (3, 64, 5), (2, 96, 7)])
def test_mxfp4_of_any_size(shape: tuple[int, int, int]) -> None:
    parts = random_mxfp4(shape)
    assert same_bf16(round_mxfp4(parts), decode_mxfp4(parts).bfloat16())


def test_every_mxfp4_byte_at_every_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16)
    parts = {"blocks": blocks, "scales": scales}
    expected = decode_mxfp4(parts).bfloat16()
    assert expected.isinf().any() and expected.isnan().any()
    assert same_bf16(round_mxfp4(parts), expected)
    parts["scales"] = scales.view(torch.float8_e8m0fnu)
    assert same_bf16(round_mxfp4(parts), expected)
