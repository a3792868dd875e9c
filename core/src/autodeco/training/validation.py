"""Held-out measurements, and the warning when the heads collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from autodeco.engines.base import Engine, TokenBatch
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.objective import Objective, ObjectiveSums, objective_sums
from autodeco.training.parallel import add_sums

_NEAR = 0.02


def summarize(sums: ObjectiveSums) -> dict[str, float]:
    """Turns sums into the means that are logged.

    Returns:
        ``loss`` and its two terms; ``nll`` (nats a token under softmax(z/T), before the cut);
        ``outside_nucleus`` (share of labels that the cut would forbid); mean and standard
        deviation of T and P.
    """
    count = max(1, sums.measured)
    divisor = max(1, sums.normalizer)
    result = {
        "loss": sums.loss / divisor,
        "temperature_loss": sums.temperature_loss / divisor,
        "top_p_loss": sums.top_p_loss / divisor,
        "nll": sums.nll / count,
        "outside_nucleus": sums.outside_nucleus / count,
        "kept": float(sums.kept),
        "tokens": float(sums.tokens),
    }
    for name in ("temperature", "top_p"):
        mean = getattr(sums, f"{name}_sum") / count
        square = getattr(sums, f"{name}_square_sum") / count
        result[f"{name}_mean"] = mean
        result[f"{name}_std"] = math.sqrt(max(0.0, square - mean * mean))
    return result


def measure(
    engine: Engine,
    heads: DecodingHeads,
    batches: Iterable[TokenBatch],
    objective: Objective,
    *,
    seed: int,
) -> dict[str, float]:
    """Measures the heads on held-out batches; no gradient, no drop of what is reported.

    Raises:
        NumericsError: A loss is not finite.
    """
    total = ObjectiveSums.zero()
    output = engine.output_weight()
    for hidden in engine.hidden_states(batches):
        if hidden is not None:
            total += objective_sums(
                heads, hidden, output, objective, seed=seed, epoch=0, backward=False, drop=0.0
            )
    return summarize(add_sums(total if engine.counts else ObjectiveSums.zero(), engine.device))


def collapse_warning(metrics: dict[str, Any], heads: DecodingHeads) -> str | None:
    """Returns a sentence when T or P sits at a bound almost everywhere, else None."""
    if not metrics["tokens"]:
        return None
    bounds = {"temperature": (0.0, 2.0, heads.temp_head), "top_p": (0.0, 1.0, heads.top_p_head)}
    for name, (low, high, head) in bounds.items():
        mean, spread = metrics[f"{name}_mean"], metrics[f"{name}_std"]
        margin = _NEAR * (high - low)
        if head is None or spread > margin or low + margin < mean < high - margin:
            continue
        bound = low if mean <= low + margin else high
        return (
            f"the {name.replace('_', '-')} head has collapsed to {bound:g} "
            f"(mean {mean:.3f}, spread {spread:.3f}): it no longer tells tokens apart; "
            "a smaller --learning-rate or another --objective may help"
        )
    return None
