"""The two terms of the loss a token, with their derivatives in T and P."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autodeco.heads.closed_form import (
    Block,
    Moments,
    Workspace,
    base_log_p,
    label_log_p,
    moments,
)
from autodeco.heads.soft_mask import SoftLogP, soft_masked_log_p
from autodeco.heads.variants import Objective


@dataclass(frozen=True)
class TokenTerms:
    """What a variant makes of some tokens, all [n].

    Attributes:
        temperature: L_T and dL_T/dT; None where the term is left out.
        top_p: L_P, dL_P/dT and dL_P/dP; None where the term is left out.
        nll: -log softmax(z/T)_y at the T that decoding would use.
        outside: bool, the label is outside the hard nucleus of (T, P).
    """

    temperature: tuple[Tensor, Tensor] | None
    top_p: tuple[Tensor, Tensor, Tensor] | None
    nll: Tensor
    outside: Tensor


def token_terms(
    block: Block,
    at: Moments,
    top_p: Tensor,
    work: Workspace,
    objective: Objective,
    *,
    with_temperature: bool,
    with_top_p: bool,
) -> TokenTerms:
    """Losses of a block of tokens.

    Args:
        block: their logits.
        at: moments at the heads' T.
        top_p: P [n].
        work: scratch; overwritten.
        objective: the variant.
        with_temperature, with_top_p: which terms to take. Without L_P, P must be 1.
    """
    log_p, log_p_slope = label_log_p(block, at)
    nll = -log_p
    soft, mass = None, None
    if with_top_p:
        soft, mass = soft_masked_log_p(block, at, top_p, exact=objective.exact)
    outside = torch.zeros_like(block.label, dtype=torch.bool)
    if mass is not None:
        # Nothing stands before the first token, which the nucleus always holds.
        outside = (mass.before >= top_p) & (mass.before > 0) & (top_p < 1)

    clamp = max(objective.temperature_clamp, objective.top_p_clamp)
    rows = (at.temperature < clamp).nonzero()[:, 0]
    if rows.numel():
        # Below a clamp the loss is that at the clamp, and its derivative in T is 0.
        low = block.select(rows)
        clamped = torch.full_like(low.label_x, clamp)
        low_at = moments(low, clamped, work, features=False, slopes=False)
        if objective.temperature_clamp == clamp:
            log_p = log_p.index_copy(0, rows, label_log_p(low, low_at)[0])
            log_p_slope = log_p_slope.index_fill(0, rows, 0.0)
        if soft is not None and objective.top_p_clamp == clamp:
            low_soft, _ = soft_masked_log_p(low, low_at, top_p[rows], exact=objective.exact)
            soft = SoftLogP(
                soft.value.index_copy(0, rows, low_soft.value),
                soft.temperature_slope.index_fill(0, rows, 0.0),
                soft.top_p_slope.index_copy(0, rows, low_soft.top_p_slope),
            )

    weights = {"one": torch.ones_like(log_p), "tempered": log_p.exp()}
    if "base" in (objective.temperature_weight, objective.top_p_weight):
        weights["base"] = base_log_p(block, work).exp()
    w_t, w_p = weights[objective.temperature_weight], weights[objective.top_p_weight]
    return TokenTerms(
        (-w_t * log_p, -w_t * log_p_slope) if with_temperature else None,
        None
        if soft is None
        else (-w_p * soft.value, -w_p * soft.temperature_slope, -w_p * soft.top_p_slope),
        nll,
        outside,
    )
