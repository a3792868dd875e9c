"""One token a row by inverse CDF, each row under its own temperature, top-p, top-k and min-p."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autodeco.heads.warp import TEMPERATURE_FLOOR

_HEAD = 1024  # candidates that nearly always hold the nucleus, where the vocabulary is large
_SORT_ALL = 4096  # up to this many values, sorting them all is as fast


def draw_tokens(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws a token a row from softmax(z/T) cut by top-k, then the nucleus, then min-p.

    The order is (logit, then smaller id first), as in ``autodeco.heads.warp``, whose nucleus this
    is. The cuts keep a prefix of that order, of which token n is taken where the cumulative mass
    passes ``u`` times the prefix's mass. With top_k = 1 this is the arg-max.

    Args:
        logits: [m, V], any float dtype.
        temperature: float32 [m], floored at 1e-4.
        top_p: float32 [m]; >= 1 cuts nothing.
        top_k: int64 [m]; 0 cuts nothing.
        min_p: float32 [m]; tokens less probable than min_p times the first are cut.
        u: float64 [m] in [0, 1).

    Returns:
        Token ids int64 [m] and the entropy, float32 [m] in nats, of what was drawn from.
    """
    z = logits.float()
    vocabulary = z.shape[-1]
    z = z - z.amax(-1, keepdim=True)
    t = temperature.float().clamp_min(TEMPERATURE_FLOOR).unsqueeze(-1)
    rows = (t, top_p, top_k, min_p, u)
    if vocabulary <= _SORT_ALL:
        values, ids = _descending(z)
        return _draw(values, ids, *rows, total=None)[:2]
    values, ids = _largest(z, _HEAD)
    total = (z / t).exp_().sum(-1, dtype=torch.float64)
    token, entropy, settled = _draw(values, ids, *rows, total=total)
    open_rows = (~settled).nonzero()[:, 0]
    if open_rows.numel():
        values, ids = _descending(z[open_rows])
        cut = [x[open_rows] for x in rows]
        token[open_rows], entropy[open_rows] = _draw(
            values, ids, cut[0], cut[1], cut[2], cut[3], cut[4], total=None
        )[:2]
    return token, entropy


def _draw(
    values: Tensor,
    ids: Tensor,
    t: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    u: Tensor,
    *,
    total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, entropy and whether ``values`` [m, w], a head of the order, was enough for a row.

    Args:
        total: float64 [m], mass of all V tokens; None where ``values`` holds all of them.
    """
    width = values.shape[-1]
    x = values / t
    mass = x.exp()
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    ranks = torch.arange(width, device=values.device)
    k = torch.where(top_k > 0, top_k, torch.full_like(top_k, width + 1)).unsqueeze(-1)
    everything = cumulative[:, -1] if total is None else total
    within_k = cumulative.gather(-1, (k - 1).clamp_max(width - 1)).squeeze(-1)
    whole = torch.where(k[:, 0] <= width, within_k, everything).unsqueeze(-1)
    p = top_p.double().unsqueeze(-1)
    keep = ((cumulative - mass) < p * whole) | (p >= 1)
    keep &= ranks < k
    keep &= mass >= min_p.unsqueeze(-1)  # the first token's mass is exp(0) = 1
    keep[:, 0] = True
    count = keep.sum(-1, keepdim=True)
    kept = cumulative.gather(-1, count - 1)
    choice = (cumulative <= u.unsqueeze(-1) * kept).sum(-1, keepdim=True).minimum(count - 1)
    token = ids.gather(-1, choice).squeeze(-1)
    mass = mass.masked_fill_(~keep, 0.0)
    energy = (mass * x.nan_to_num_(neginf=0.0)).sum(-1) / kept[:, 0]
    entropy = (kept[:, 0].log() - energy).clamp_min_(0.0).float()
    if total is None:
        return token, entropy, torch.ones_like(token, dtype=torch.bool)
    # Among values tied with the last candidate, ids that were left out might come first.
    last_kept = values.gather(-1, count - 1)
    settled = (count[:, 0] < width) & (last_kept[:, 0] > values[:, -1])
    settled &= top_k <= width  # a wider top-k has a mass that is not known here
    return token, entropy, settled


def _descending(z: Tensor) -> tuple[Tensor, Tensor]:
    """All values and their ids by (value, then smaller id first)."""
    if z.device.type != "cpu":
        return torch.sort(z, dim=-1, descending=True, stable=True)
    # numpy sorts 64-bit integers with vector instructions, several times faster than torch sorts
    # pairs: the value's bits, made monotone, above the id. Adding 0 turns -0.0 into 0.0.
    bits = (z + 0.0).contiguous().numpy().view(np.int32).astype(np.int64)
    bits = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = np.sort(((-bits - 1) << 32) | np.arange(z.shape[-1], dtype=np.int64), axis=-1)
    ids = torch.from_numpy(keys & 0xFFFFFFFF)
    return z.gather(-1, ids), ids


def _largest(z: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest values and their ids by (value, then smaller id first)."""
    values, ids = torch.topk(z, width, dim=-1)
    ids, order = ids.sort(-1)
    values, again = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, again)
