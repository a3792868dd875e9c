"""How a token is chosen, and the one rule that says when the heads choose; imports no torch.

The same rule serves transformers' generate() and vLLM.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autodeco.errors import UsageError

SAMPLING_PARAMETERS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class DecodingPolicy:
    """One way of decoding, under a name.

    Attributes:
        name: what tables call it.
        kind: "greedy"; "static" (one temperature, top_p, top_k, min_p for all tokens); or "heads"
            (T and P predicted for each token, times the two scales).
        temperature, top_p, top_k, min_p: of a static policy.
        temperature_scale, top_p_scale: the dial of the heads.

    Raises:
        UsageError: A value is out of its range.
    """

    name: str
    kind: Literal["greedy", "static", "heads"]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    temperature_scale: float = 1.0
    top_p_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("greedy", "static", "heads"):
            raise UsageError(
                f"unknown kind of decoding {self.kind!r}",
                where=self.name,
                fix="use greedy, static or heads",
            )
        ranges = {
            "temperature": 0 < self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
        }
        for name, good in ranges.items():
            if not good:
                raise UsageError(
                    f"{name} = {getattr(self, name)!r} is out of range",
                    where=self.name,
                    fix="temperature > 0, top_p in (0, 1], top_k >= 0, min_p in [0, 1]",
                )
        check_scale("temperature_scale", self.temperature_scale)
        check_scale("top_p_scale", self.top_p_scale)


def check_scale(name: str, value: Any) -> float:
    """A multiplier on what the heads predict: positive and finite.

    Raises:
        UsageError: It is neither.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise UsageError(
            f"{name} = {value!r}: a positive number is needed",
            fix="1 leaves the heads as they are; use autodeco=False to switch them off",
        )
    return float(value)


def is_neutral(name: str, value: Any) -> bool:
    """Whether a sampling parameter changes nothing: T = 1, top_p = 1, top_k <= 0, min_p <= 0."""
    if value is None:
        return True
    return bool(value == 1) if name in ("temperature", "top_p") else bool(value <= 0)


def heads_off_reason(
    explicit: Mapping[str, Any], *, autodeco: bool = True, greedy: bool = False
) -> str | None:
    """The one rule: why the heads stay out of a call, or None when they choose.

    Args:
        explicit: the sampling parameters that the call, or a generation_config passed to it,
            sets. A model's own defaults are no choice of the user's and do not belong here.
        autodeco: False switches the heads off.
        greedy: whether the call decodes greedily.

    Returns:
        The reason, in words; any single non-neutral value switches off both heads.
    """
    if not autodeco:
        return "autodeco=False"
    if greedy:
        return "greedy decoding (do_sample=False)"
    for name in SAMPLING_PARAMETERS:
        if not is_neutral(name, explicit.get(name)):
            return f"{name}={explicit[name]!r} was set explicitly"
    return None
