"""Evaluation: the heads beside greedy, the vendor's default, a static grid and the mean shift."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autodeco.decoding.answers import check, require_method
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.problems import Problem, choose_format, load_problems, problem_prompts
from autodeco.decoding.results import (
    GREEDY,
    HEADS,
    MEAN_SHIFT,
    STATIC,
    VENDOR,
    BestStatic,
    EvaluationResult,
    SettingResult,
    Shown,
    best_static,
    evaluation_table,
    verdict,
    with_comparisons,
)
from autodeco.decoding.sampler import Answer, Progress
from autodeco.decoding.sampling import Sampling
from autodeco.decoding.settings import (
    default_dial,
    default_grid,
    heads_policy,
    static_name,
    static_policy,
    vendor_policy,
)
from autodeco.decoding.statistics import accuracy_interval
from autodeco.errors import UsageError
from autodeco.heads.modules import DecodingHeads

__all__ = [
    "BestStatic",
    "EvaluationResult",
    "Problem",
    "SettingResult",
    "Shown",
    "default_dial",
    "default_grid",
    "evaluate",
    "evaluation_table",
    "heads_policy",
    "load_problems",
    "problem_prompts",
    "static_policy",
    "vendor_policy",
]


def evaluate(
    model: Any,
    heads: DecodingHeads | None,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    generation_config: Mapping[str, Any] | None = None,
    grid: Sequence[DecodingPolicy] | None = None,
    dial: Sequence[DecodingPolicy] | None = None,
    samples: int = 1,
    max_new_tokens: int = 2048,
    eos_ids: Sequence[int] | None = None,
    seed: int = 1234,
    method: str = "auto",
    problem_format: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    rows_at_once: int | None = None,
    resamples: int = 2000,
    shown: int = 3,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    answers_file: Path | None = None,
) -> EvaluationResult:
    """Measures every setting on the same problems with the same random numbers.

    Args:
        model: a transformers causal language model.
        heads: None leaves out the heads and the mean shift.
        tokenizer: the model's.
        problems: of :func:`load_problems`.
        generation_config: the base model's own (the vendor's default is read from it).
        grid: static settings; default :func:`default_grid`.
        dial: heads settings; default :func:`default_dial`. The mean shift is taken from the one
            with both scales 1 (the first, if none has them).
        samples: answers for each problem and setting (greedy: one).
        max_new_tokens: longest answer.
        eos_ids: tokens that end an answer; default: the tokenizer's.
        seed: of sampling and bootstrap.
        method: how answers are checked, see ``autodeco.decoding.answers``.
        problem_format: see :func:`autodeco.decoding.problems.choose_format`.
        chat_template_kwargs: see :func:`problem_prompts`.
        rows_at_once: see ``sample_answers``.
        resamples: bootstrap samples.
        shown: sample answers kept for the report, of the heads (without heads, of T=1).
        progress: called with (answers done, answers in all) after every token.
        say: called with one line that says how many answers are to come.
        answers_file: keeps every answer as soon as it ended; those that it holds of an evaluation
            of the same heads, problems and settings are not sampled again.

    Raises:
        UsageError, DataError, EnvironmentProblem, NumericsError: with what to do.
    """
    require_method(method)
    if samples < 1 or not problems:
        raise UsageError(
            "an evaluation needs at least one problem and one sample",
            fix="give problems, and samples of at least 1",
        )
    prompts = problem_prompts(
        problems,
        tokenizer,
        chat=choose_format(problems, tokenizer, problem_format) == "chat",
        chat_template_kwargs=chat_template_kwargs,
    )
    if eos_ids is None:
        eos_ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def decode(answer: Answer) -> str:
        return str(tokenizer.decode(answer.ids.tolist(), skip_special_tokens=True))

    def judge(answer: Answer) -> bool:
        return check(decode(answer), problems[answer.prompt].gt, method)

    plan = _plan(generation_config, grid, dial, with_heads=heads is not None)
    count = sum(1 if policy.kind == "greedy" else samples for policy, _ in plan)
    total = len(problems) * (count + (samples if heads is not None else 0))
    with Sampling(
        model,
        heads,
        prompts,
        [policy for policy, _ in plan],
        total=total,
        decode=decode,
        file=answers_file,
        rows_at_once=rows_at_once,
        progress=progress,
        say=say,
        seed=seed,
        max_new_tokens=max_new_tokens,
        eos_ids=list(eos_ids),
    ) as sampling:
        answers = _first_pass(plan, sampling, samples)
        shift = None if heads is None else _mean_shift(answers[_reference(plan)])
        shifted = sampling([shift], samples)[0] if shift is not None else []
    results = [_setting(p, role, a, judge) for (p, role), a in zip(plan, answers, strict=True)]
    roles = [role for _, role in plan]
    example = _example(plan)
    if shift is not None:
        results.insert(roles.index(HEADS), _setting(shift, MEAN_SHIFT, shifted, judge))
    results = with_comparisons(results, seed=seed, resamples=resamples)
    return EvaluationResult(
        settings=tuple(results),
        best_static=best_static(results),
        problems=len(problems),
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        verdict=tuple(verdict(results, seed=seed, resamples=resamples)),
        shown=tuple(
            _shown(plan[example][0], problems[a.prompt], a, judge)
            for a in [a for a in answers[example] if a.sample == 0][:shown]
        ),
    )


def _shown(
    policy: DecodingPolicy, problem: Problem, answer: Answer, judge: Callable[[Answer], bool]
) -> Shown:
    text = problem.problem
    if problem.messages is not None:
        text = json.dumps(list(problem.messages), ensure_ascii=False)
    return Shown(policy.name, text, problem.gt, judge(answer), answer)


def _first_pass(
    plan: Sequence[tuple[DecodingPolicy, str]], sampling: Sampling, samples: int
) -> list[list[Answer]]:
    """The answers of each setting of the plan; greedy ones are sampled once."""
    found: dict[int, list[Answer]] = {}
    for greedy in (False, True):
        places = [n for n, (policy, _) in enumerate(plan) if (policy.kind == "greedy") == greedy]
        if places:
            given = sampling([plan[n][0] for n in places], 1 if greedy else samples)
            found.update(zip(places, given, strict=True))
    return [found[n] for n in range(len(plan))]


def _plan(
    generation_config: Mapping[str, Any] | None,
    grid: Sequence[DecodingPolicy] | None,
    dial: Sequence[DecodingPolicy] | None,
    *,
    with_heads: bool,
) -> list[tuple[DecodingPolicy, str]]:
    """The settings of the first pass with their roles."""
    plan = [(DecodingPolicy("greedy", "greedy"), GREEDY)]
    vendor = vendor_policy(generation_config)
    plan += [(vendor, VENDOR)] if vendor is not None else []
    plan += [(policy, STATIC) for policy in (default_grid() if grid is None else grid)]
    if with_heads:
        turns = default_dial() if dial is None else list(dial)
        if not turns:
            raise UsageError("the dial is empty", fix="give at least one heads policy")
        plan += [(policy, HEADS) for policy in turns]
    wrong = [p.name for p, role in plan if (p.kind == "heads") != (role == HEADS)]
    if wrong:
        raise UsageError(
            f"policies of the wrong kind in grid or dial: {', '.join(wrong)}",
            fix="use static policies in the grid and heads in the dial",
        )
    return plan


def _reference(plan: Sequence[tuple[DecodingPolicy, str]]) -> int:
    """Which setting is the heads as trained (the first of the heads, if the dial has no such)."""
    heads = [(n, policy) for n, (policy, role) in enumerate(plan) if role == HEADS]
    plain = [n for n, p in heads if p.temperature_scale == 1 and p.top_p_scale == 1]
    return plain[0] if plain else heads[0][0]


def _example(plan: Sequence[tuple[DecodingPolicy, str]]) -> int:
    """Whose answers the report shows: the heads as trained, without heads T=1, else the last."""
    if any(role == HEADS for _, role in plan):
        return _reference(plan)
    plain = [n for n, (policy, _) in enumerate(plan) if policy == static_policy(1.0)]
    return plain[0] if plain else len(plan) - 1


def _mean_shift(answers: Sequence[Answer]) -> DecodingPolicy:
    """The constant (T, P) at the mean over all tokens of what the heads predicted."""
    t = _mean_of([a.temperature for a in answers])
    p = _mean_of([a.top_p for a in answers])
    assert t is not None and p is not None
    name = f"mean shift ({static_name(t, p, 0, 0)})"
    return DecodingPolicy(name, "static", max(t, 1e-4), min(max(p, 1e-6), 1.0))


def _mean_of(values: Sequence[NDArray[np.float32] | None]) -> float | None:
    given = [v for v in values if v is not None]
    return float(np.concatenate(given).astype(np.float64).mean()) if given else None


def _setting(
    policy: DecodingPolicy, role: str, answers: Sequence[Answer], judge: Callable[[Answer], bool]
) -> SettingResult:
    """Adds up one setting's answers, which come ordered by problem, then sample."""
    problems = answers[-1].prompt + 1
    right = np.array([judge(a) for a in answers], dtype=np.float64).reshape(problems, -1)
    entropies = np.array([a.entropy for a in answers], dtype=np.float64).reshape(problems, -1)
    low, high = accuracy_interval(right)
    static = policy.kind == "static"
    return SettingResult(
        policy=policy,
        role=role,
        accuracy=float(right.mean()),
        low=low,
        high=high,
        entropy=float(entropies.mean()),
        temperature=policy.temperature if static else _mean_of([a.temperature for a in answers]),
        top_p=policy.top_p if static else _mean_of([a.top_p for a in answers]),
        length=float(np.mean([len(a.ids) for a in answers])),
        unfinished=float(np.mean([not a.finished for a in answers])),
        correct=right.mean(1),
        entropies=entropies.mean(1),
    )
