"""Evaluation results made by hand, for the tests of verdict, table and report."""

from __future__ import annotations

from typing import Any

import numpy as np

from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.results import (
    GREEDY,
    HEADS,
    MEAN_SHIFT,
    STATIC,
    VENDOR,
    EvaluationResult,
    SettingResult,
    Shown,
    best_static,
    verdict,
    with_comparisons,
)
from autodeco.decoding.sampler import Answer
from autodeco.decoding.settings import heads_policy, static_policy, vendor_policy
from autodeco.decoding.statistics import accuracy_interval

PROBLEMS = 200
GREEDY_POLICY = DecodingPolicy("greedy", "greedy")
VENDOR_POLICY: Any = vendor_policy({"temperature": 0.6, "top_p": 0.95, "top_k": 20})
SHIFT_POLICY = DecodingPolicy("mean shift (T=0.81 P=0.93)", "static", 0.81, 0.93)


def setting(
    policy: DecodingPolicy, role: str, accuracy: Any, entropy: Any, problems: int = PROBLEMS
) -> SettingResult:
    """A setting of this accuracy and entropy: one number, or one for each problem.

    One number is spread over pairs of neighbours, so that both halves have the same mean.
    """
    pairs = np.arange(problems) // 2
    if np.isscalar(accuracy):
        accuracy = (pairs * 37) % (problems // 2) < round(accuracy * (problems // 2))
    if np.isscalar(entropy):
        entropy = entropy * np.where(pairs % 2, 1.1, 0.9)
    right, nats = np.asarray(accuracy, dtype=float), np.asarray(entropy, dtype=float)
    low, high = accuracy_interval(right[:, None])
    greedy = policy.kind == "greedy"
    return SettingResult(
        policy=policy,
        role=role,
        accuracy=float(right.mean()),
        low=low,
        high=high,
        entropy=float(nats.mean()),
        temperature=None if greedy else policy.temperature,
        top_p=None if greedy else policy.top_p,
        length=12.5,
        unfinished=0.25,
        correct=right,
        entropies=nats,
    )


def baselines() -> list[SettingResult]:
    """A static curve from (0, 0.9) to (40, 0.5)."""
    return [
        setting(GREEDY_POLICY, GREEDY, 0.9, 0.0),
        setting(VENDOR_POLICY, VENDOR, 0.8, 15.0),
        setting(static_policy(1.0), STATIC, 0.5, 40.0),
        setting(static_policy(0.8), STATIC, 0.7, 25.0),
        setting(static_policy(0.8, 0.9), STATIC, 0.6, 20.0),
    ]


def result(
    accuracy: float = 0.85,
    entropy: float = 25.0,
    shift: tuple[float, float] | None = (0.7, 24.0),
    dial: tuple[DecodingPolicy, ...] = (heads_policy(),),
    shown: tuple[Shown, ...] = (),
) -> EvaluationResult:
    """An evaluation whose heads have this accuracy and entropy, a little less along the dial."""
    made = baselines()
    if shift is not None:
        made.append(setting(SHIFT_POLICY, MEAN_SHIFT, *shift))
    for turn, policy in enumerate(dial):
        made.append(setting(policy, HEADS, accuracy, entropy * 0.9**turn))
    made = with_comparisons(made, seed=3, resamples=400)
    return EvaluationResult(
        settings=tuple(made),
        best_static=best_static(made),
        problems=PROBLEMS,
        samples=1,
        seed=3,
        max_new_tokens=64,
        verdict=tuple(verdict(made, seed=3, resamples=400)),
        shown=shown,
    )


def shown(
    ids: list[int],
    *,
    heads: bool = True,
    correct: bool = True,
    problem: str = "1+1=",
    gt: str = "2",
) -> Shown:
    """A sample answer whose T rises from 0.25 and whose P falls from 1."""
    steps = np.arange(len(ids), dtype=np.float32)
    t, p = (0.25 + 0.5 * steps, 1 - 0.125 * steps) if heads else (None, None)
    answer = Answer(0, 0, 0, np.array(ids, dtype=np.int32), t, p, 1.5, True)
    return Shown("heads", problem, gt, correct, answer)
