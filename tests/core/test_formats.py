"""Storage formats: decoded to the bit as the specifications say, and as transformers does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from format_tools import QUANTIZED, demo, family_of, random_fp8, random_mxfp4, same_bits

from autodeco.convert.formats import (
    decode_fp8_blocks,
    decode_mxfp4,
    encode_fp8_blocks,
    encode_mxfp4,
)
from autodeco.convert.shards import ShardReader
from autodeco.convert.source import open_source
from autodeco.engines.hf import HFEngine
from autodeco.job import Job

# OCP Microscaling Formats (MX) v1.0: E2M1 has a sign bit, two of exponent, one of mantissa
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def e4m3(byte: int) -> float:
    """The value of a byte, by OCP's 8-bit floating point specification, table 1 (E4M3)."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 0xF, byte & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def fp8_reference(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Element by element, one float32 product each."""
    table = np.array([e4m3(byte) for byte in range(256)], dtype=np.float32)
    values, factors = table[weight.view(torch.uint8).numpy()], scale.float().numpy()
    found = np.empty(values.shape, dtype=np.float32)
    with np.errstate(all="ignore"):
        for i, j in itertools.product(*map(range, values.shape)):
            found[i, j] = values[i, j] * factors[i // 128, j // 128]
    return torch.from_numpy(found)


def mxfp4_reference(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Element by element in float64, rounded once; experts, inputs, outputs."""
    experts, outputs, groups, _ = blocks.shape
    found = np.empty((experts, groups * 32, outputs), dtype=np.float64)
    for e, o, g in itertools.product(range(experts), range(outputs), range(groups)):
        exponent = int(scales[e, o, g]) - 127
        for k, byte in enumerate(blocks[e, o, g].tolist()):
            for half, code in enumerate((byte & 15, byte >> 4)):
                found[e, 32 * g + 2 * k + half, o] = math.ldexp(E2M1[code], exponent)
    with np.errstate(over="ignore"):
        return torch.from_numpy(found.astype(np.float32))


@pytest.mark.parametrize("size", [(128, 128), (130, 259), (1, 1), (127, 128), (300, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_are_decoded_to_the_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    parts = random_fp8(*size, dtype)
    before = {name: tensor.clone() for name, tensor in parts.items()}
    assert same_bits(decode_fp8_blocks(parts), fp8_reference(**parts))
    assert all(torch.equal(parts[n].view(torch.uint8), before[n].view(torch.uint8)) for n in parts)


def test_every_fp8_byte_at_extreme_scales_is_decoded_to_the_bit() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).expand(128, 256).contiguous()
    tiny, huge = 2.0**-126, 2.0**119  # products go down to subnormals and up to 448 * 2**119
    parts = {"weight": bytes_.view(torch.float8_e4m3fn), "scale": torch.tensor([[tiny, huge]])}
    decoded = decode_fp8_blocks(parts)
    assert same_bits(decoded, fp8_reference(**parts))
    assert decoded[0, 1] == 2.0**-135 and decoded[0, 254] == -448.0 * huge
    assert torch.isnan(decoded[0, [127, 255]]).all()  # the two NaN of E4M3 stay NaN: never a number
    exponents = torch.tensor([[0, 254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    parts["scale"] = exponents
    assert same_bits(decode_fp8_blocks(parts), fp8_reference(parts["weight"], exponents))


@pytest.mark.parametrize("shape", [(1, 32, 1), (3, 64, 5), (2, 96, 7)])
def test_mxfp4_is_decoded_to_the_bit(shape: tuple[int, int, int]) -> None:
    parts = random_mxfp4(shape)
    decoded = decode_mxfp4(parts)
    assert tuple(decoded.shape) == shape
    assert same_bits(decoded, mxfp4_reference(**parts))
    as_e8m0 = {**parts, "scales": parts["scales"].view(torch.float8_e8m0fnu)}
    assert same_bits(decode_mxfp4(as_e8m0), decoded)


def test_every_mxfp4_byte_at_every_exponent_is_decoded_to_the_bit() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)
    decoded = decode_mxfp4({"blocks": blocks, "scales": scales})
    assert same_bits(decoded, mxfp4_reference(blocks, scales))
    assert decoded[0, 2, 0] == 2.0**-128  # byte 1, its low half first: 0.5 at the exponent -127
    assert decoded[0, 3, 0] == 0.0
    # 255 is NaN in the specification: what is not zero must not come out as a number
    nan = decode_mxfp4({"blocks": blocks[:, :1], "scales": torch.full((1, 1, 16), 255).byte()})
    assert not torch.isfinite(nan).any()


@pytest.mark.parametrize("size", [(128, 128), (200, 300), (5, 3)])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_fp8_blocks_keep_three_bits(size: tuple[int, int], magnitude: float) -> None:
    value = torch.randn(size, generator=torch.Generator().manual_seed(1)) * magnitude
    value[: size[0] // 2, :2] *= 1e-3
    parts = encode_fp8_blocks(value)
    decoded = decode_fp8_blocks(parts)
    assert parts["weight"].dtype == torch.float8_e4m3fn and parts["scale"].dtype == torch.float32
    scale = parts["scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    scale = scale[: size[0], : size[1]].double()
    # half a step of three bits, or half of the smallest subnormal; and the products' own rounding
    bound = torch.maximum(value.double().abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)
    assert ((decoded.double() - value.double()).abs() <= bound).all()
    again = encode_fp8_blocks(decoded)
    assert torch.equal(decode_fp8_blocks(again), decoded)  # what was rounded stays as it is


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e30])
def test_mxfp4_is_off_by_a_quarter_of_the_largest_at_most(magnitude: float) -> None:
    value = torch.randn(2, 96, 5, generator=torch.Generator().manual_seed(2)) * magnitude
    decoded = decode_mxfp4(encode_mxfp4(value))
    grouped = (value.view(2, 3, 32, 5), decoded.reshape(2, 3, 32, 5))
    error, largest = (grouped[0] - grouped[1]).abs().amax(2), grouped[0].abs().amax(2)
    assert (error <= largest / 4).all() and (error > 0).any()
    assert torch.equal(decode_mxfp4(encode_mxfp4(decoded)), decoded)


@pytest.mark.parametrize(
    "value",
    [0.0, 2.0**-149, 1e-38, 3e38],
    ids=["zero", "smallest", "tiny", "largest"],
)
def test_extreme_blocks_stay_finite(value: float) -> None:
    for tensor in (torch.full((130, 64), value), torch.full((130, 64), -value)):
        tensor[0, 0] = 0.0
        fp8 = decode_fp8_blocks(encode_fp8_blocks(tensor))
        mxfp4 = decode_mxfp4(encode_mxfp4(tensor[None, :128]))[0]
        for decoded in (fp8, mxfp4):
            assert torch.isfinite(decoded).all() and decoded[0, 0] == 0
            assert ((decoded == 0) | (decoded.sign() == tensor[: len(decoded)].sign())).all()
        if value in (0.0, 3e38):
            assert torch.allclose(fp8, tensor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_trained_demo_has_the_weights_that_transformers_makes_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, every parameter and buffer: transformers dequantizes on the CPU.

    It asks for accelerate first, and does not use it on one device. It shares a partial block's
    rows out among the scales, against the format: the demo's scales are right both ways.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8, quantizer_mxfp4

    for module in (quantizer_finegrained_fp8, quantizer_mxfp4):
        monkeypatch.setattr(module, "is_accelerate_available", lambda *_: True)
    family, path = family_of(name), demo(name)
    weights = open_source(family, Job(plugin=name, model=path, preset="demo"))
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    ours = HFEngine(path, cpu, dtype, dropped=weights.weight_map.dropped).model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    biases = [t.dtype for n, t in ours.items() if n.endswith("e_score_correction_bias")]
    assert biases == [torch.float32] * (3 if name == "deepseek_v3" else 0)


def test_transformers_own_functions_give_the_same() -> None:
    """Where no published value is: random bytes, and 256 wide matrices, whole blocks."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    mx = random_mxfp4((4, 128, 6), seed=3)
    theirs = convert_moe_packed_tensors(mx["blocks"], mx["scales"], dtype=torch.float32)
    assert same_bits(decode_mxfp4(mx), theirs)
    fp8 = random_fp8(384, 256, torch.float32, seed=3)
    theirs = Fp8Dequantize(None)._dequantize_one(fp8["weight"], fp8["scale"], torch.float32)
    assert same_bits(decode_fp8_blocks(fp8), theirs)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_demo_really_stores_its_weights_in_the_format(name: str) -> None:
    formats = {"gpt_oss": "mxfp4", "deepseek_v3": "fp8_blocks"}
    with ShardReader(demo(name)) as reader:
        kinds = {t.format.name for t in reader.tensors.values() if t.format}
        coded = sum(math.prod(t.shape) for t in reader.tensors.values() if t.format)
        every = sum(math.prod(t.shape) for t in reader.tensors.values())
    assert kinds == {formats[name]} and coded > every / 2
