"""The one rule that says when the heads choose, in words, and the ranges of a policy."""

from __future__ import annotations

from typing import Any

import pytest

from autodeco.decoding.policy import DecodingPolicy, heads_off_reason
from autodeco.errors import UsageError

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def test_rule_in_words() -> None:
    assert heads_off_reason({}) is None
    assert heads_off_reason(NEUTRAL) is None
    assert heads_off_reason({"top_k": -1, "temperature": None, "top_p": 1}) is None
    assert heads_off_reason({"temperature": 0.0}) == "temperature=0.0 was set explicitly"
    assert heads_off_reason({}, autodeco=False) == "autodeco=False"
    assert "greedy" in str(heads_off_reason({}, greedy=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"temperature_scale": 0.0},
        {"top_p_scale": float("nan")},
        {"kind": "magic"},
    ],
)
def test_policy_ranges(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DecodingPolicy(**{"name": "p", "kind": "static", **bad})
