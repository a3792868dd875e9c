"""Decodes FP8 in blocks and MXFP4 to bfloat16 at once, on the CPU, several times as fast.

The result is, to the bit, what `autodeco.convert.formats` decodes in float32, rounded once. E4M3
and E2M1 have fewer bits than bfloat16, so that a value is looked up exactly; its product with the
scale is computed in float32 and rounded as it is stored. Lookups are numpy's, which has a fast one
for bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodeco.convert.formats import E2M1, E8M0_BIAS, E8M0_NAN, FP8_BLOCK, MX_BLOCK

_ROWS = 32  # looked up at once: numpy widens the bytes to indices, which should stay in the cache


@lru_cache
def _values_of_bytes() -> Any:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return every.to(torch.bfloat16).view(torch.int16).numpy()


@lru_cache
def _values_of_codes() -> Any:
    signed = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.bfloat16)
    return signed.view(torch.int16).numpy()


@lru_cache
def _powers_of_two() -> Tensor:
    exponents = torch.arange(256, dtype=torch.int32) - E8M0_BIAS
    powers = torch.ldexp(torch.ones(256), exponents)
    powers[E8M0_NAN] = torch.nan
    return powers.to(torch.bfloat16)  # 2**-127, the smallest, is a subnormal number that it has


def round_fp8_blocks(parts: Mapping[str, Tensor]) -> Tensor:
    """Multiplies each block of 128 x 128 values by its scale, and rounds.

    Args:
        parts: As for `autodeco.convert.formats.decode_fp8_blocks`, on the CPU.

    Returns:
        bfloat16 [n, k].
    """
    weight, scales = parts["weight"], parts["scale"].float().tolist()
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    source, target = weight.view(torch.uint8).numpy(), result.view(torch.int16).numpy()
    table = _values_of_bytes()
    for number, row in enumerate(scales):
        first = number * FP8_BLOCK
        for start in range(first, min(first + FP8_BLOCK, len(source)), _ROWS):
            stop = min(start + _ROWS, first + FP8_BLOCK)
            np.take(table, source[start:stop], out=target[start:stop], mode="clip")
        strip = result[first : first + FP8_BLOCK]
        for block, scale in zip(torch.split(strip, FP8_BLOCK, dim=1), row, strict=True):
            block.mul_(scale)
    return result


def round_mxfp4(parts: Mapping[str, Tensor]) -> Tensor:
    """Looks up the two values of each byte and multiplies them by their block's power of two.

    Args:
        parts: As for `autodeco.convert.formats.decode_mxfp4`, on the CPU.

    Returns:
        bfloat16 [experts, inputs, outputs], as the model has it.
    """
    blocks, scales = parts["blocks"], parts["scales"].view(torch.uint8)
    experts, outputs, groups, _ = blocks.shape
    result = torch.empty((experts, groups * MX_BLOCK, outputs), dtype=torch.bfloat16)
    table, half = _values_of_codes(), MX_BLOCK // 2
    for expert in range(experts):
        # bytes are turned round, not values: there are half as many, of half the size
        turned = blocks[expert].reshape(outputs, -1).t().contiguous()
        powers = _powers_of_two()[scales[expert].t().long()]
        for group, target in enumerate(result[expert].view(groups, MX_BLOCK, outputs)):
            pairs = turned[group * half : (group + 1) * half]
            codes = torch.stack((pairs & 15, pairs >> 4), dim=1).view_as(target)
            np.take(table, codes.numpy(), out=target.view(torch.int16).numpy(), mode="clip")
            target.mul_(powers[group])
    return result
