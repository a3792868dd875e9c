"""The warp: logits divided by T and cut to the nucleus of mass P, a pair (T, P) a row."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE_FLOOR = 1e-4
#: exp(-SOFT_CUT) is 0 in float32, yet a token that was lowered by it is still there to choose when
#: everything in the nucleus has been ruled out.
SOFT_CUT = 1e4
_HEAD = 1024


def nucleus_mask(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens belong to the nucleus: the smallest prefix whose mass reaches P.

    The order is (logit, then smaller id first). Token i is kept iff the mass of softmax(z/T)
    before it is below P; the first one always is. Rows with P >= 1 keep every token.

    Args:
        logits: [m, V], any float dtype; -inf marks a token that was already ruled out.
        temperature: [m], floored at 1e-4.
        top_p: [m].

    Returns:
        bool [m, V].
    """
    x = logits.float()
    x = x - x.amax(-1, keepdim=True)
    t = temperature.float().clamp_min(TEMPERATURE_FLOOR).unsqueeze(-1)
    p = top_p.double().unsqueeze(-1)
    total = (x / t).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    keep = torch.ones_like(x, dtype=torch.bool)
    rows = (p[:, 0] < 1).nonzero()[:, 0]
    # A nucleus rarely needs more than the head of the distribution: sort V values only for the
    # rows whose head does not hold it.
    for width in sorted({min(_HEAD, x.shape[-1]), x.shape[-1]}):
        if rows.numel() == 0:
            break
        xr = x[rows]
        head = torch.topk(xr, width, dim=-1).values if width < x.shape[-1] else _descending(xr)
        mass = (head / t[rows]).exp_().double()
        before = mass.cumsum(-1).sub_(mass)
        inside = before < p[rows] * total[rows]
        inside[:, 0] = True
        count = inside.sum(-1)
        done = (count < width) | torch.tensor(width == x.shape[-1], device=x.device)
        settled = done.nonzero()[:, 0]
        keep[rows[settled]] = _first(xr[settled], head[settled], count[settled])
        rows = rows[(~done).nonzero()[:, 0]]
    return keep


def _descending(x: Tensor) -> Tensor:
    return torch.sort(x, dim=-1, descending=True).values


def _first(x: Tensor, head: Tensor, count: Tensor) -> Tensor:
    """Mark the first ``count`` tokens in the order (value, then smaller id), [r, V]."""
    last = head.gather(-1, count.unsqueeze(-1) - 1)
    above = x > last
    tied = x == last
    room = count.unsqueeze(-1) - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


def warp(logits: Tensor, temperature: Tensor, top_p: Tensor, *, soft: bool = False) -> Tensor:
    """Divide each row by its T and rule out what lies behind its nucleus.

    Args:
        logits: [m, V], any float dtype.
        temperature: [m] in (0, 2) (any positive number is taken), floored at 1e-4.
        top_p: [m]; a row with P >= 1 is only divided.
        soft: lower the tokens outside by `SOFT_CUT`, which gives them the probability 0 as well, so
            that what rules out tokens later (a minimum length, bad words) cannot leave nothing.

    Returns:
        float32 [m, V]: z/T in the nucleus, -inf (or z/T - `SOFT_CUT`) elsewhere. At least one token
        a row is finite.
    """
    t = temperature.float().clamp_min(TEMPERATURE_FLOOR).unsqueeze(-1)
    keep = nucleus_mask(logits, temperature, top_p)
    scaled = logits.float() / t
    if soft:
        return torch.where(keep, scaled, scaled - SOFT_CUT)
    return scaled.masked_fill_(~keep, float("-inf"))
