"""evaluate(): which settings are measured, on what, and that every number is what it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_heads, tiny_model

from autodeco.decoding.evaluation import evaluate
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.problems import Problem
from autodeco.decoding.results import (
    GREEDY,
    HEADS,
    MEAN_SHIFT,
    STATIC,
    VENDOR,
    EvaluationResult,
    best_static,
)
from autodeco.decoding.sampler import Answer, sample_answers
from autodeco.decoding.settings import (
    default_dial,
    default_grid,
    heads_policy,
    static_policy,
    vendor_policy,
)
from autodeco.decoding.statistics import accuracy_interval
from autodeco.errors import DataError, UsageError

EOS, LONGEST, SEED = 5, 6, 11
GRID = (static_policy(1.0), static_policy(0.6, 0.9))
DIAL = (heads_policy(), heads_policy(0.7), heads_policy(1.0, 0.8))
VENDOR_FILE = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
# Of different lengths, so that the sampler's order (by length) is not the file's.
PROBLEMS = [
    Problem(text, str(n % 2), None, n + 1)
    for n, text in enumerate(("hello", "a", "longer than that", "be", "see", "d", "question?", "q"))
]


class Parity:
    """A tokenizer of one token a letter; an answer is the parity of its last token but the end."""

    eos_token_id: int | None = EOS
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i == EOS)]
        return f"the answer is {kept[-1] % 2}." if kept else "none"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def measure(model: Any, heads: Any, **changes: Any) -> EvaluationResult:
    options: dict[str, Any] = {
        "problems": PROBLEMS,
        "grid": GRID,
        "dial": DIAL,
        "max_new_tokens": LONGEST,
        "seed": SEED,
        "resamples": 50,
        **changes,
    }
    return evaluate(model, heads, Parity(), **options)


@pytest.fixture(scope="module")
def found(model: Any) -> EvaluationResult:
    return measure(model, tiny_heads(), generation_config=VENDOR_FILE, samples=3)


def sampled(model: Any, policy: DecodingPolicy, samples: int = 3) -> list[Answer]:
    """The answers of one setting, sampled alone."""
    prompts = [Parity()(problem.problem)["input_ids"] for problem in PROBLEMS]
    return sample_answers(
        model,
        tiny_heads(),
        prompts,
        [policy],
        samples=samples,
        max_new_tokens=LONGEST,
        eos_ids=[EOS],
        seed=SEED,
    )


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (None, None),
        ({}, None),
        ({"eos_token_id": 3, "max_length": 20, "temperature": None}, None),
        ({"do_sample": False, "temperature": 0.6}, "greedy"),
        ({"do_sample": False}, "greedy"),
        ({"temperature": 0.0}, "greedy"),
        ({"do_sample": True, "temperature": 0}, "greedy"),
        ({"do_sample": True}, (1.0, 1.0, 50, 0.0)),  # transformers' own top_k
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, (0.6, 0.95, 20, 0.0)),
        ({"do_sample": True, "top_p": 0.9}, (1.0, 0.9, 50, 0.0)),
        ({"temperature": 1, "top_k": 0}, (1.0, 1.0, 0, 0.0)),
        ({"temperature": 0.7, "top_k": -1, "min_p": 0.05}, (0.7, 1.0, 0, 0.05)),
        ({"min_p": 0.1, "do_sample": None}, (1.0, 1.0, 50, 0.1)),
    ],
)
def test_the_vendors_default_is_what_its_generation_config_asks_for(
    config: dict[str, Any] | None, policy: Any
) -> None:
    made = vendor_policy(config)
    if policy is None:
        assert made is None
    elif policy == "greedy":
        assert made == DecodingPolicy("vendor (greedy)", "greedy")
    else:
        assert made is not None and made.kind == "static" and made.name.startswith("vendor (T=")
        assert (made.temperature, made.top_p, made.top_k, made.min_p) == policy


def test_a_vendors_value_out_of_range_is_an_error_that_says_whose() -> None:
    with pytest.raises(UsageError, match="top_p") as caught:
        vendor_policy({"top_p": 1.5})
    assert "vendor" in str(caught.value.where)


def test_policies_are_named_after_their_values() -> None:
    assert static_policy(1.0).name == "T=1"
    assert static_policy(0.7, 0.95).name == "T=0.7 P=0.95"
    assert static_policy(1.0, min_p=0.05).name == "T=1 min-p=0.05"
    assert vendor_policy(VENDOR_FILE).name == "vendor (T=0.7 P=0.8 k=20)"  # type: ignore[union-attr]
    assert [heads_policy(*turn).name for turn in ((1, 1), (0.85, 1), (0.7, 0.9))] == [
        "heads",
        "heads T×0.85",
        "heads T×0.7 P×0.9",
    ]


def test_the_default_grid_and_dial_hold_what_an_honest_comparison_needs() -> None:
    grid, dial = default_grid(), default_dial()
    for policies in (grid, dial):
        assert len({policy.name for policy in policies}) == len(policies)
    assert len(grid) == 16 and {policy.kind for policy in grid} == {"static"}
    assert static_policy(1.0) in grid
    assert any(p.top_p < 1 == p.temperature for p in grid) and any(p.min_p for p in grid)
    assert min(p.temperature for p in grid) <= 0.3
    assert dial[0] == heads_policy() and {policy.kind for policy in dial} == {"heads"}
    turned = {(p.temperature_scale != 1, p.top_p_scale != 1) for p in dial[1:]}
    assert turned == {(True, False), (False, True)}


def test_the_settings_come_in_order_baselines_first_then_mean_shift_then_heads(
    found: EvaluationResult,
) -> None:
    assert [setting.role for setting in found.settings] == [
        *(GREEDY, VENDOR, STATIC, STATIC, MEAN_SHIFT),
        *[HEADS] * 3,
    ]
    policies = [s.policy for s in found.settings if s.role not in (GREEDY, MEAN_SHIFT)]
    assert policies == [vendor_policy(VENDOR_FILE), *GRID, *DIAL]
    assert (found.problems, found.samples, found.seed) == (len(PROBLEMS), 3, SEED)
    assert found.max_new_tokens == LONGEST
    compared = [s.role for s in found.settings if s.against_curve is not None]
    assert compared == [MEAN_SHIFT, *[HEADS] * 3]
    assert found.best_static == best_static(found.settings) is not None


def test_every_number_of_a_setting_is_that_of_its_answers(
    model: Any, found: EvaluationResult
) -> None:
    seen = set()
    for setting in found.settings:
        samples = 1 if setting.role == GREEDY else 3
        answers = sampled(model, setting.policy, samples)
        right = np.array(
            [
                f"is {PROBLEMS[a.prompt].gt}." in Parity().decode(a.ids.tolist(), True)
                for a in answers
            ],
            dtype=float,
        ).reshape(len(PROBLEMS), samples)
        nats = np.array([a.entropy for a in answers]).reshape(len(PROBLEMS), samples)
        assert setting.correct.tolist() == right.mean(1).tolist(), setting.name
        assert setting.accuracy == pytest.approx(right.mean())
        assert (setting.low, setting.high) == accuracy_interval(right)
        np.testing.assert_allclose(setting.entropies, nats.mean(1), rtol=1e-4, atol=1e-4)
        assert setting.entropy == pytest.approx(nats.mean(), rel=1e-4)
        assert setting.length == pytest.approx(np.mean([len(a.ids) for a in answers]))
        assert setting.unfinished == pytest.approx(np.mean([not a.finished for a in answers]))
        seen.add(setting.accuracy)
        assert 0 <= setting.unfinished <= 1 <= setting.length <= LONGEST
    assert len(seen) > 3, "the test cannot tell settings apart"
    assert 0 < found.settings[2].unfinished < 1


def test_the_mean_shift_is_the_mean_over_all_tokens_of_what_the_heads_predicted(
    model: Any, found: EvaluationResult
) -> None:
    heads, t, p, answers_t = tiny_heads(), [], [], []
    for answer in sampled(model, heads_policy()):
        prompt = Parity()(PROBLEMS[answer.prompt].problem)["input_ids"]
        ids = torch.tensor([prompt + answer.ids.tolist()])
        with torch.no_grad():
            h = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
            h = h[len(prompt) - 1 : -1]  # the positions that chose the answer's tokens
            given = heads.predict(h, model.lm_head(h))
        t += given[0].tolist()
        p += given[1].tolist()
        answers_t.append(float(given[0].mean()))
    (shift,) = found.by_role(MEAN_SHIFT)
    assert shift.policy.kind == "static" and shift.policy.top_k == shift.policy.min_p == 0
    assert shift.policy.temperature == pytest.approx(np.mean(t), rel=1e-4)
    assert shift.policy.top_p == pytest.approx(np.mean(p), rel=1e-4)
    assert abs(np.mean(answers_t) - np.mean(t)) > 1e-3, "a mean of answers' means would pass"
    assert shift.name == f"mean shift (T={np.mean(t):.4g} P={np.mean(p):.4g})"
    reference = found.by_role(HEADS)[0]
    assert reference.temperature == pytest.approx(shift.policy.temperature)
    assert (shift.temperature, shift.top_p) == (shift.policy.temperature, shift.policy.top_p)


def test_the_mean_shift_is_of_the_untouched_heads_wherever_they_stand_in_the_dial(
    model: Any, found: EvaluationResult
) -> None:
    expected = found.by_role(MEAN_SHIFT)[0].policy
    turned = measure(model, tiny_heads(), samples=3, dial=(DIAL[1], DIAL[0]))
    policy = turned.by_role(MEAN_SHIFT)[0].policy
    assert policy.temperature == pytest.approx(expected.temperature, rel=1e-5)
    assert policy.top_p == pytest.approx(expected.top_p, rel=1e-5)
    assert turned.shown[0].setting == "heads"
    alone = measure(model, tiny_heads(), dial=(DIAL[1],))
    (shift,), (heads,) = alone.by_role(MEAN_SHIFT), alone.by_role(HEADS)
    assert heads.temperature is not None
    assert shift.policy.temperature == pytest.approx(heads.temperature)
    assert heads.temperature < 0.9 * expected.temperature


def test_heads_of_temperature_alone_shift_the_temperature_alone(model: Any) -> None:
    found = measure(model, tiny_heads("temperature"), dial=(heads_policy(),))
    policy = found.by_role(MEAN_SHIFT)[0].policy
    assert policy.top_p == 1.0 and policy.temperature != 1.0


@pytest.mark.parametrize("vendor", [VENDOR_FILE, {"do_sample": False}])
def test_greedy_is_sampled_once_and_progress_counts_every_answer(
    model: Any, vendor: dict[str, Any]
) -> None:
    told: list[tuple[int, int]] = []
    found = measure(
        model,
        tiny_heads(),
        generation_config=vendor,
        samples=4,
        rows_at_once=7,
        progress=lambda done, total: told.append((done, total)),
    )
    once = 1 + ("do_sample" in vendor)
    count = len(PROBLEMS) * (once + 4 * (len(found.settings) - once))
    assert told[-1] == (count, count) and {total for _, total in told} == {count}
    done = [done for done, _ in told]
    assert done == sorted(done) and done[0] == 0 and len(set(done)) > 5
    greedy = found.by_role(GREEDY)[0]
    assert set(greedy.correct.tolist()) <= {0.0, 1.0} and greedy.entropy == 0
    assert (greedy.temperature, greedy.top_p) == (None, None)
    if once == 2:
        (second,) = found.by_role(VENDOR)
        assert second.correct.tolist() == greedy.correct.tolist() and second.entropy == 0


def test_without_heads_there_are_the_static_settings_alone(model: Any) -> None:
    found = measure(model, None)
    assert [setting.role for setting in found.settings] == [GREEDY, STATIC, STATIC]
    assert found.verdict == ("No heads were given: these are the static settings alone.",)
    assert all(setting.against_curve is None for setting in found.settings)


def test_bug_without_heads_the_report_showed_answers_of_the_last_setting(model: Any) -> None:
    """T=1 was meant; the default grid ends with a min-p of 0.2."""
    found = measure(model, None, grid=[static_policy(0.3), static_policy(1.0), static_policy(0.2)])
    assert [one.setting for one in found.shown] == ["T=1"] * 3
    for grid, name in (([static_policy(0.3)], "T=0.3"), ([], "greedy")):
        assert measure(model, None, grid=grid).shown[0].setting == name


def test_an_empty_grid_leaves_greedy_and_the_vendor(model: Any) -> None:
    found = measure(model, tiny_heads(), grid=[], dial=[heads_policy()])
    assert [setting.role for setting in found.settings] == [GREEDY, MEAN_SHIFT, HEADS]
    assert found.best_static is None
    vendor = measure(model, None, grid=[], generation_config=VENDOR_FILE)
    assert vendor.best_static is not None and vendor.best_static.name.startswith("vendor")


def test_the_sample_answers_are_the_first_problems_and_judged(model: Any) -> None:
    found = measure(model, tiny_heads(), samples=2, shown=4)
    answers = [a for a in sampled(model, heads_policy(), 2) if a.sample == 0][:4]
    for one, problem, answer in zip(found.shown, PROBLEMS, answers, strict=False):
        assert (one.setting, one.problem, one.gt) == ("heads", problem.problem, problem.gt)
        assert one.answer.ids.tolist() == answer.ids.tolist()
        assert one.answer.temperature is not None
        said = Parity().decode(answer.ids.tolist(), True)
        assert one.correct == (f"is {problem.gt}." in said)
    assert len(found.shown) == 4 and not measure(model, None, shown=0).shown


def test_the_same_seed_gives_the_same_result_and_another_seed_another(
    model: Any, found: EvaluationResult
) -> None:
    options: dict[str, Any] = {"generation_config": VENDOR_FILE, "samples": 3}
    again = measure(model, tiny_heads(), **options)
    assert again.to_json() == found.to_json()
    other = measure(model, tiny_heads(), seed=SEED + 1, **options).to_json()
    assert other["settings"][2]["entropies"] != found.to_json()["settings"][2]["entropies"]
    assert other["settings"][0]["correct"] == found.to_json()["settings"][0]["correct"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": [heads_policy(0.9)]}, "wrong kind in grid or dial: heads T×0.9"),
        ({"dial": [static_policy(0.5)]}, "wrong kind in grid or dial: T=0.5"),
        ({"dial": []}, "the dial is empty"),
        ({"problems": []}, "at least one problem"),
        ({"samples": 0}, "one sample"),
        ({"method": "magic"}, "'magic'"),
        ({"problem_format": "magic"}, "'magic'"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_before_anything_is_sampled(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        measure(None, tiny_heads(), **changes)  # there is no model to sample from
    assert caught.value.fix


def test_a_chat_without_a_template_is_an_error_before_anything_is_sampled() -> None:
    with pytest.raises(DataError, match="chat template"):
        measure(None, None, problem_format="chat")
    chat = [Problem("", "1", ({"role": "user", "content": "q"},), 1)]
    with pytest.raises(DataError, match="chat template"):
        measure(None, None, problems=chat)


def test_tokens_that_end_an_answer_are_the_tokenizers_unless_others_are_given(model: Any) -> None:
    every = list(range(VOCABULARY))
    ended = measure(model, None, eos_ids=every)
    assert {setting.length for setting in ended.settings} == {1.0}
    assert {setting.unfinished for setting in ended.settings} == {0.0}
    endless = measure(model, None, eos_ids=[])
    assert {setting.length for setting in endless.settings} == {float(LONGEST)}
    assert {setting.unfinished for setting in endless.settings} == {1.0}
