"""Decodes and encodes the storage formats of `autodeco.storage`: FP8 in blocks, MXFP4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FP8_BLOCK = 128
_FP8_LARGEST = 448.0  # of float8_e4m3fn
MX_BLOCK = 32
E8M0_BIAS = 127
E8M0_NAN = 255
# OCP Microscaling Formats (MX) v1.0, section 5.3.3: E2M1, sign in the highest of four bits
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_LARGEST_EXPONENT = 2


def decode_fp8_blocks(parts: Mapping[str, Tensor]) -> Tensor:
    """Multiplies each block of 128 x 128 values by its scale.

    Args:
        parts: ``weight`` float8_e4m3fn [n, k] and ``scale`` [ceil(n / 128), ceil(k / 128)] in
            float32, bfloat16 or float8_e8m0fnu.

    Returns:
        float32 [n, k].
    """
    weight, scale = parts["weight"].float(), parts["scale"].float()
    for first in range(0, weight.shape[0], FP8_BLOCK):
        rows = weight[first : first + FP8_BLOCK]
        factors = scale[first // FP8_BLOCK].repeat_interleave(FP8_BLOCK)[: weight.shape[1]]
        rows.mul_(factors)
    return weight


def encode_fp8_blocks(tensor: Tensor) -> dict[str, Tensor]:
    """Rounds a float32 tensor [n, k] to float8_e4m3fn, with a float32 scale a block."""
    n, k = tensor.shape
    rows, columns = -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)
    padded = tensor.new_zeros(rows * FP8_BLOCK, columns * FP8_BLOCK)
    padded[:n, :k] = tensor
    blocks = padded.view(rows, FP8_BLOCK, columns, FP8_BLOCK)
    largest = blocks.abs().amax(dim=(1, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = largest / _FP8_LARGEST
    weight = (blocks / scale[:, None, :, None]).view_as(padded)[:n, :k]
    return {"weight": weight.to(torch.float8_e4m3fn).contiguous(), "scale": scale}


def decode_mxfp4(parts: Mapping[str, Tensor]) -> Tensor:
    """Looks up the two values of each byte and multiplies them by the power of two of their block.

    Args:
        parts: ``blocks`` uint8 [experts, outputs, inputs / 32, 16], the lower four bits first, and
            ``scales`` uint8 [experts, outputs, inputs / 32], exponents biased by 127; 255 is NaN.

    Returns:
        float32 [experts, inputs, outputs], as the model has it.
    """
    blocks, scales = parts["blocks"], parts["scales"].view(torch.uint8)
    values = torch.empty((*blocks.shape[:-1], MX_BLOCK), device=blocks.device)
    # an expert at a time: what the lookup needs beside the result is several times as large
    for expert in range(len(blocks)):
        values[expert] = _decode_mx_blocks(blocks[expert], scales[expert])
    return values.flatten(-2).transpose(-1, -2)


def _decode_mx_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., blocks, 32] of bytes [..., blocks, 16] and their scales [..., blocks]."""
    signed = (*E2M1, *(-value for value in E2M1))
    table = torch.tensor(signed, dtype=torch.float32, device=blocks.device)
    both = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1)
    exponents = scales.to(torch.int32) - E8M0_BIAS
    values = torch.ldexp(both.flatten(-2), exponents[..., None])
    return values.masked_fill_((scales == E8M0_NAN)[..., None], torch.nan)


def encode_mxfp4(tensor: Tensor) -> dict[str, Tensor]:
    """Rounds a float32 tensor [experts, inputs, outputs] to MXFP4, 32 inputs a block.

    The scale is that of the specification: the largest exponent of the block, less that of E2M1.
    """
    experts, inputs, outputs = tensor.shape
    blocks = tensor.transpose(-1, -2).reshape(experts, outputs, inputs // MX_BLOCK, MX_BLOCK)
    largest = blocks.abs().amax(dim=-1)
    exponent = largest.clamp_min(2.0**-100).log2().floor() - _E2M1_LARGEST_EXPONENT
    table = torch.tensor(E2M1, dtype=torch.float32, device=tensor.device)
    edges = (table[1:] + table[:-1]) / 2
    scaled = torch.ldexp(blocks, -exponent[..., None].to(torch.int32))
    codes = torch.bucketize(scaled.abs().contiguous(), edges) + 8 * (scaled < 0)
    pairs = codes.to(torch.uint8).view(*codes.shape[:-1], MX_BLOCK // 2, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return {"blocks": packed, "scales": (exponent + E8M0_BIAS).to(torch.uint8)}
