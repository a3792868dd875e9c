"""The settings of an evaluation: vendor's default, static grid, the heads over their dial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autodeco.decoding.policy import DecodingPolicy


def vendor_policy(generation_config: Mapping[str, Any] | None) -> DecodingPolicy | None:
    """The sampling that the base model's own generation_config.json asks for.

    Args:
        generation_config: its content; values that it leaves out are transformers' defaults
            (T 1, top_p 1, top_k 50). None where there is no such file.

    Returns:
        None where there is no file or nothing in it is about sampling; greedy if ``do_sample`` is
        off or T is 0.
    """
    config = dict(generation_config or {})
    keys = ("do_sample", "temperature", "top_p", "top_k", "min_p")
    if all(config.get(key) is None for key in keys):
        return None
    temperature = 1.0 if config.get("temperature") is None else float(config["temperature"])
    if config.get("do_sample") is False or temperature == 0:
        return DecodingPolicy("vendor (greedy)", "greedy")
    top_p = 1.0 if config.get("top_p") is None else float(config["top_p"])
    top_k = 50 if config.get("top_k") is None else max(0, int(config["top_k"]))
    min_p = 0.0 if config.get("min_p") is None else float(config["min_p"])
    name = f"vendor ({static_name(temperature, top_p, min_p, top_k)})"
    return DecodingPolicy(name, "static", temperature, top_p, top_k, min_p)


def static_policy(temperature: float, top_p: float = 1.0, min_p: float = 0.0) -> DecodingPolicy:
    """A static policy under the name that tables use."""
    name = static_name(temperature, top_p, min_p, 0)
    return DecodingPolicy(name, "static", temperature, top_p, 0, min_p)


def static_name(temperature: float, top_p: float, min_p: float, top_k: int) -> str:
    parts = [f"T={temperature:.4g}"]
    parts += [f"P={top_p:.4g}"] if top_p < 1 else []
    parts += [f"k={top_k}"] if top_k else []
    parts += [f"min-p={min_p:.4g}"] if min_p else []
    return " ".join(parts)


def default_grid() -> list[DecodingPolicy]:
    """The 16 static settings that an evaluation tries unless told otherwise."""
    pairs = [(1.0, 1.0), (1.0, 0.95), (1.0, 0.9), (1.0, 0.8), (1.0, 0.6), (0.9, 1.0), (0.8, 1.0)]
    pairs += [(0.8, 0.95), (0.7, 1.0), (0.7, 0.9), (0.6, 0.95), (0.5, 1.0), (0.3, 1.0), (1.2, 0.8)]
    return [static_policy(t, p) for t, p in pairs] + [
        static_policy(1.0, min_p=0.05),
        static_policy(1.0, min_p=0.2),
    ]


def default_dial() -> list[DecodingPolicy]:
    """The heads as trained, then over both sides of their dial."""
    turns = [(1.0, 1.0)] + [(1.0, s) for s in (0.95, 0.9, 0.8)] + [(s, 1.0) for s in (0.85, 0.7)]
    return [heads_policy(t, p) for t, p in turns]


def heads_policy(temperature_scale: float = 1.0, top_p_scale: float = 1.0) -> DecodingPolicy:
    """A heads policy under the name that tables use."""
    parts = [f"T×{temperature_scale:.4g}"] if temperature_scale != 1 else []
    parts += [f"P×{top_p_scale:.4g}"] if top_p_scale != 1 else []
    return DecodingPolicy(
        " ".join(["heads", *parts]),
        "heads",
        temperature_scale=temperature_scale,
        top_p_scale=top_p_scale,
    )
