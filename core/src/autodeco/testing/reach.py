"""Checks that the sequences of the kit reach what only long or large ones reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autodeco.family import ModelPreset
from autodeco.testing.checks import CheckFailed
from autodeco.testing.context import Context, stock_config
from autodeco.testing.logits import (
    LENGTHS,
    TOLERANCE,
    reference,
    some_batch,
    stock_logits,
    stock_model,
)

# far above what rounding does: an engine without the feature cannot pass
SEEN = 20 * TOLERANCE


def features(context: Context) -> str:
    """Switches each feature off and looks whether the logits of stock transformers change."""
    seen: dict[str, float] = {}
    for preset in context.random_presets:
        architecture = context.architecture(preset)
        config = stock_config(architecture.config_json(preset.shape, preset.config))
        batch = some_batch(preset.shape.vocab_size)
        for what, large, changes in _features(config):
            path = reference(context, preset, large=large)
            with_it = stock_logits(stock_model(path), batch)
            without = stock_logits(stock_model(path, **changes), batch)
            change = float((with_it - without).abs().max())
            if not change > SEEN:
                raise _out_of_reach(preset, what, change, changes)
            seen[what] = min(change, seen.get(what, change))
    if not seen:
        return f"no window, no rotary scaling, no clamp; {max(LENGTHS)} tokens"
    said = ", ".join(f"{what} moves logits by {change:.1e}" for what, change in seen.items())
    return f"{said} (off against on)"


def _features(config: Any) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Yields what a configuration has: its name, whether it takes large activations, and how to
    switch it off."""
    layers = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in layers:
        yield "window", False, {"sliding_window": 1 << 20}
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") != "default":
        plain = {"rope_type": "default", "rope_theta": rotary["rope_theta"]}
        yield f"{rotary['rope_type']} rotary scaling", False, {"rope_parameters": plain}
    for key in ("swiglu_limit",):
        if getattr(config, key, None) is not None:
            yield key, True, {key: 1e6}


def _out_of_reach(
    preset: ModelPreset, what: str, change: float, changes: dict[str, Any]
) -> CheckFailed:
    key = next(iter(changes))
    return CheckFailed(
        f"without {what} the logits change by {change:.1e} only: it is out of reach",
        where=f"preset {preset.name}, sequences of {max(LENGTHS)} tokens",
        fix=f"give the random preset a {key!r} in `config` that acts on so short sequences, as "
        "a window of 8, or original_max_position_embeddings of 64",
    )
