"""The two terms of the loss a token, with their derivatives in T and P."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeco.heads.closed_form import (
    Moments,
    Order,
    Workspace,
    label_log_p,
    moments,
    order_of,
)
from autodeco.heads.soft_mask import (
    LabelMass,
    Look,
    SoftLogP,
    first_width,
    in_parts,
    soft_masked_log_p,
    tail_mass,
)
from autodeco.heads.variants import Objective


@dataclass(frozen=True)
class Seen:
    """What a sweep over the logits of some tokens leaves: a few numbers each.

    Attributes:
        order: the head of each row's order.
        at: moments at the tokens' T.
        tail: mass of the labels outside the head; None if not asked for.
    """

    order: Order
    at: Moments
    tail: LabelMass | None = None


def see(
    logits: Tensor,
    label: Tensor,
    temperature: Tensor,
    work: Workspace,
    *,
    features: bool = False,
    slopes: bool = False,
    mass: bool = False,
    base: bool = False,
) -> Seen:
    """Sweep over logits [n, V] of tokens with labels and T [n].

    Args:
        logits, label, temperature: the tokens.
        work: scratch of at least n rows.
        features, slopes: what else the moments shall hold.
        mass: whether the label's cumulative mass is needed.
        base: whether the frozen model's own probability is needed.
    """
    order = order_of(logits, label, first_width(work.vocabulary.size), work.vocabulary)
    wanted = {"features": features, "slopes": slopes, "base": base}
    at = moments(logits, order.peak, temperature, work, **wanted)
    return Seen(order, at, tail_mass(logits, order, at, work.vocabulary) if mass else None)


def join(parts: list[Seen]) -> Seen:
    """Tokens of several sweeps as one."""
    joined: Seen = _join(parts)
    return joined


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if first is None or isinstance(first, int):
        return first
    names = [f.name for f in fields(first)]
    return type(first)(*(_join([getattr(p, n) for p in parts]) for n in names))


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
    seen: Seen,
    top_p: Tensor,
    look: Look,
    objective: Objective,
    *,
    with_temperature: bool,
    with_top_p: bool,
) -> TokenTerms:
    """Losses of some tokens.

    Args:
        seen: the sweep over their logits.
        top_p: P [n].
        look: gives logits again, for the few rows that need it.
        objective: the variant.
        with_temperature, with_top_p: which terms to take. Without L_P, P must be 1.
    """
    order, at = seen.order, seen.at
    log_p, log_p_slope = label_log_p(order, at)
    nll = -log_p
    soft = None
    outside = torch.zeros_like(order.label, dtype=torch.bool)
    if with_top_p:
        exact = objective.exact
        soft, mass = soft_masked_log_p(order, at, seen.tail, top_p, look, exact=exact)
        # Nothing stands before the first token, which the nucleus always holds.
        outside = (mass.before >= top_p) & (mass.before > 0) & (top_p < 1)

    clamp = max(objective.temperature_clamp, objective.top_p_clamp)
    rows = (at.temperature < clamp).nonzero()[:, 0]
    for part in in_parts(rows, look.rows):
        # Below a clamp the loss is that at the clamp, and its derivative in T is 0.
        low = _at_clamp(order.label[part], clamp, look, part, mass=with_top_p)
        if objective.temperature_clamp == clamp:
            log_p = log_p.index_copy(0, part, label_log_p(low.order, low.at)[0])
            log_p_slope = log_p_slope.index_fill(0, part, 0.0)
        if soft is not None and objective.top_p_clamp == clamp:
            again = replace(look, logits=partial(_of_rows, look, part))
            low_soft, _ = soft_masked_log_p(
                low.order, low.at, low.tail, top_p[part], again, exact=objective.exact
            )
            soft = SoftLogP(
                soft.value.index_copy(0, part, low_soft.value),
                soft.temperature_slope.index_fill(0, part, 0.0),
                soft.top_p_slope.index_copy(0, part, low_soft.top_p_slope),
            )

    weights = {"one": torch.ones_like(log_p), "tempered": log_p.exp()}
    if at.base is not None:
        weights["base"] = order.label_x.exp() / at.base
    w_t, w_p = weights[objective.temperature_weight], weights[objective.top_p_weight]
    return TokenTerms(
        (-w_t * log_p, -w_t * log_p_slope) if with_temperature else None,
        None
        if soft is None
        else (-w_p * soft.value, -w_p * soft.temperature_slope, -w_p * soft.top_p_slope),
        nll,
        outside,
    )


def _of_rows(look: Look, rows: Tensor, of: Tensor) -> Tensor:
    return look.logits(rows[of])


def _at_clamp(label: Tensor, clamp: float, look: Look, rows: Tensor, *, mass: bool) -> Seen:
    logits = look.logits(rows)
    t = torch.full(
        label.shape,
        clamp,
        dtype=torch.promote_types(logits.dtype, torch.float32),
        device=label.device,
    )
    return see(logits, label, t, look.work, mass=mass)
