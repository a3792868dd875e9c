"""The four variants of the objective, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autodeco.heads.warp import TEMPERATURE_FLOOR


@dataclass(frozen=True)
class Objective:
    """One variant of the objective.

    Attributes:
        name: how the command line calls it.
        summary: one line for the help.
        drop: default share of tokens to drop among those whose arg-max is the label.
        temperature_term: whether L_T is part of the loss.
        temperature_weight: w_T: "one", "tempered" (p_y at T) or "base" (softmax(z)_y); detached.
        top_p_weight: w_P: "one" or "base"; detached.
        drop_top_p: whether a dropped token loses L_P too, or only L_T.
        detach_temperature: whether T, as the top-p head reads it (the features of softmax(z/T)
            included), carries no gradient.
        temperature_clamp, top_p_clamp: lower bound of T in L_T and in L_P; below it the
            derivative in T is 0. Never under the general floor of 1e-4.
        exact: log p_y + log m_y - log Z; else the published form with its two 1e-9.
        per_sample: average within each sample, then over samples; else over all kept tokens.
    """

    name: str
    summary: str
    drop: float
    temperature_term: bool = True
    temperature_weight: str = "one"
    top_p_weight: str = "one"
    drop_top_p: bool = True
    detach_temperature: bool = False
    temperature_clamp: float = TEMPERATURE_FLOOR
    top_p_clamp: float = TEMPERATURE_FLOOR
    exact: bool = False
    per_sample: bool = False


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        o.name: o
        for o in (
            Objective(
                "nll",
                "no weights, no drop, exact logarithms: keeps the entropy of free tokens",
                drop=0.0,
                temperature_clamp=1e-2,
                top_p_clamp=1e-2,
                exact=True,
            ),
            Objective(
                "megatron",
                "the published NeMo code: L_T weighted by p_y, L_P by softmax(z)_y, drop on both",
                drop=0.6,
                temperature_weight="tempered",
                top_p_weight="base",
            ),
            Objective(
                "hf",
                "the published transformers code: both weighted by softmax(z)_y, drop on L_T only,"
                " mean per sample",
                drop=0.6,
                temperature_weight="base",
                top_p_weight="base",
                drop_top_p=False,
                detach_temperature=True,
                temperature_clamp=1e-2,
                per_sample=True,
            ),
            # The paper names "dynamic fine-tuning" without a formula; its weight is read here as
            # the base model's probability of the label, as in both published codes' L_P.
            Objective(
                "paper",
                "the paper: only L_P, weighted by softmax(z)_y (our reading), drop on the loss",
                drop=0.6,
                temperature_term=False,
                top_p_weight="base",
            ),
        )
    }
)
