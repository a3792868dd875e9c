"""One CUDA kernel: the sums over the vocabulary in two reads of the logits and no scratch.

In plain torch the same sums are a dozen sweeps over blocks in float32. Triton comes with torch's
CUDA builds; where it is missing or cannot compile, :func:`available` says so once and the plain
form is used. Imported only for logits on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 4096


@functools.cache
def _kernel() -> Any:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def sums(  # type: ignore[no-untyped-def]
        z,
        stride,
        peak,
        temperature,
        out,
        rows,
        vocab,
        SLOPES: tl.constexpr,
        BASE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        z += row.to(tl.int64) * stride
        top = tl.load(peak + row)
        t = tl.load(temperature + row)
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        first = tl.zeros((BLOCK,), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        base = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            inside = start + lanes < vocab
            x = tl.load(z + start + lanes, mask=inside, other=0.0).to(tl.float32) - top
            e = tl.where(inside, tl.exp(x / t), 0.0)
            total += e
            first += e * x
            square += e * e
            if BASE:
                base += tl.where(inside, tl.exp(x), 0.0)
        sum_e = tl.sum(total)
        energy = tl.sum(first) / sum_e
        tl.store(out + row, sum_e)
        tl.store(out + rows + row, energy)
        tl.store(out + 2 * rows + row, tl.sum(square))
        if BASE:
            tl.store(out + 5 * rows + row, tl.sum(base))
        if SLOPES:
            spread = tl.zeros((BLOCK,), tl.float32)
            cross = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, vocab, BLOCK):
                inside = start + lanes < vocab
                x = tl.load(z + start + lanes, mask=inside, other=0.0).to(tl.float32) - top
                e = tl.where(inside, tl.exp(x / t), 0.0)
                g = e * (x - energy)
                spread += g * (x - energy)
                cross += g * e
            tl.store(out + 3 * rows + row, tl.sum(spread))
            tl.store(out + 4 * rows + row, tl.sum(cross))

    return sums


@functools.cache
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on ``device`` for logits of ``dtype``; tried once, on two rows."""
    if device.type != "cuda" or dtype not in _DTYPES or not importlib.util.find_spec("triton"):
        return False
    try:
        one = torch.ones(2, 1, device=device)
        sums_over_vocabulary(torch.ones(2, 8, dtype=dtype, device=device), one, one[:, 0])
    except (
        Exception
    ) as error:  # no C compiler, an old driver, an unknown chip: all end in plain torch
        warnings.warn(f"Triton cannot be used, the objective will be slower: {error}", stacklevel=2)
        return False
    return True


def sums_over_vocabulary(
    logits: Tensor, peak: Tensor, temperature: Tensor, *, slopes: bool = True, base: bool = True
) -> Tensor:
    """Sums with e = exp(x/T), x = z - peak.

    Args:
        logits: [n, V] on a GPU, rows contiguous.
        peak: float32 [n, 1].
        temperature: float32 [n].
        slopes, base: whether the sums that only they need are taken.

    Returns:
        float32 [6, n]: sum e; E = sum e x / sum e; sum e^2; sum e (x - E)^2; sum e^2 (x - E);
        sum exp(x). What was not asked for is 0.
    """
    n, vocab = logits.shape
    out = torch.zeros(6, n, dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _kernel()[(n,)](
            logits,
            logits.stride(0),
            peak.contiguous(),
            temperature.contiguous(),
            out,
            n,
            vocab,
            SLOPES=slopes,
            BASE=base,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return out
