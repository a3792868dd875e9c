"""Verdict, best static setting and table, from results made by hand."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from results_made import (
    GREEDY_POLICY,
    PROBLEMS,
    SHIFT_POLICY,
    VENDOR_POLICY,
    baselines,
    result,
    setting,
)
from rich.console import Console

from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.results import (
    COLUMNS,
    GREEDY,
    HEADS,
    MEAN_SHIFT,
    STATIC,
    VENDOR,
    EvaluationResult,
    best_static,
    best_static_row,
    evaluation_table,
    table_row,
    verdict,
    with_comparisons,
)
from autodeco.decoding.settings import heads_policy, static_policy
from autodeco.decoding.statistics import wilson_interval

BELOW = "BELOW the static curve: a static baseline beats it at equal entropy"


def test_heads_above_the_curve_are_said_to_be_above() -> None:
    found = result(accuracy=0.95, entropy=25.0)
    (heads,) = found.by_role(HEADS)
    assert heads.against_curve is not None and heads.against_curve.accuracy.low > 0
    first = found.verdict[0]
    assert first.startswith("heads: above the static curve, +25.0 points") and "BELOW" not in first
    assert "beyond the curve's range" not in first
    assert not any("At no less entropy" in sentence for sentence in found.verdict)


def test_heads_that_a_static_baseline_beats_are_said_to_be_beaten_and_by_which() -> None:
    found = result(accuracy=0.55, entropy=22.0)
    assert found.verdict[0].startswith(f"heads: {BELOW}, -")
    last = found.verdict[-1]
    assert last.startswith(
        "At no less entropy and no less accuracy than heads (0.550 at 22.0 nats)"
    )
    assert "T=0.8 (0.700 at 25.0)" in last  # the only one with more of both
    assert "T=1 (" not in last and "greedy" not in last and VENDOR_POLICY.name not in last


def test_heads_on_the_curve_are_not_told_apart_from_it() -> None:
    random = np.random.default_rng(0)
    made = [
        setting(one.policy, one.role, (random.random(PROBLEMS) < one.accuracy) * 1.0, one.entropy)
        for one in baselines()
    ]
    heads = setting(heads_policy(), HEADS, (random.random(PROBLEMS) < 0.7) * 1.0, 25.0)
    compared = with_comparisons([*made, heads], seed=1, resamples=400)
    (first, *_) = verdict(compared, seed=1, resamples=400)
    assert first.startswith("heads: not told apart from the static curve")
    numbers = [float(x) for x in re.findall(r"[-+]\d+\.\d", first)]
    assert numbers[1] < 0 < numbers[2] and numbers[1] <= numbers[0] <= numbers[2]
    difference: Any = compared[-1].against_curve
    assert numbers == pytest.approx(
        [100 * x for x in (difference.accuracy.value, difference.accuracy.low)]
        + [100 * difference.accuracy.high],
        abs=0.051,
    )


def test_heads_with_more_entropy_than_any_static_setting_are_flagged() -> None:
    found = result(accuracy=0.6, entropy=70.0)
    assert "its entropy is beyond the curve's range, the nearest end was taken." in found.verdict[0]
    assert table_row(found.by_role(HEADS)[0])[4].endswith("*")


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ((0.85, 26.0), "the mean shift is no worse in either: predicting token by token gained"),
        ((0.85, 25.0), "the mean shift is no worse in either"),  # a draw is none
        ((0.7, 20.0), "the heads are no worse in either"),
        ((0.9, 20.0), "one has more accuracy, the other more entropy: read the curves"),
    ],
)
def test_the_mean_shift_is_held_against_the_heads(shift: tuple[float, float], said: str) -> None:
    found = result(accuracy=0.85, entropy=25.0, shift=shift)
    sentence = found.verdict[1]
    assert sentence.startswith(f"heads minus {SHIFT_POLICY.name}: ") and said in sentence
    heads, other = (found.by_role(role)[0] for role in (HEADS, MEAN_SHIFT))
    points = 100 * (heads.accuracy - other.accuracy)
    assert f": {points:+.1f} points" in sentence
    assert f"and {heads.entropy - other.entropy:+.2f} nats" in sentence


def test_every_turn_of_the_dial_has_a_sentence_and_the_untouched_one_is_the_reference() -> None:
    dial = (heads_policy(0.85), heads_policy(), heads_policy(1.0, 0.9))
    found = result(dial=dial)
    assert [s.split(":")[0] for s in found.verdict[:3]] == [policy.name for policy in dial]
    assert found.verdict[3].startswith("heads minus ")
    assert result(dial=dial[:1]).verdict[1].startswith("heads T×0.85 minus ")


def test_without_heads_the_verdict_says_so() -> None:
    sentences = verdict(with_comparisons(baselines(), seed=0, resamples=9), seed=0, resamples=9)
    assert sentences == ["No heads were given: these are the static settings alone."]


def test_heads_and_mean_shift_alone_are_compared_and_the_curve_is_all_baselines() -> None:
    found = result()
    assert {s.role for s in found.settings if s.against_curve is not None} == {HEADS, MEAN_SHIFT}
    base = [*baselines(), setting(heads_policy(), HEADS, 0.85, 25.0)]
    whole: Any = with_comparisons(base, seed=0, resamples=9)[-1].against_curve
    for left_out in (GREEDY, VENDOR, STATIC):
        fewer = [one for one in base if one.role != left_out]
        part: Any = with_comparisons(fewer, seed=0, resamples=9)[-1].against_curve
        assert part != whole, left_out


def test_the_best_static_setting_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    even = (np.arange(PROBLEMS) % 2 == 0).astype(float)
    lucky = setting(static_policy(0.5), STATIC, 0.9 * even + 0.05 > 0.5, 5.0 + even)
    odd_only = setting(static_policy(0.3), STATIC, 1 - even, 4.0)
    best: Any = best_static([*baselines(), odd_only, lucky])
    assert best.name == "T=0.5" and best.chosen_accuracy == 1.0
    assert best.accuracy == 0.0 and best.problems == PROBLEMS // 2
    assert (best.low, best.high) == pytest.approx(wilson_interval(0.0, PROBLEMS // 2))
    assert best.entropy == pytest.approx(5.0)  # of the judging half
    assert "0.000" in best_static_row(best)


def test_of_equally_accurate_static_settings_the_one_with_more_entropy_is_the_best() -> None:
    flat = [setting(static_policy(t), STATIC, 0.9, 10 * t) for t in (0.5, 1.0, 0.7)]
    best: Any = best_static(flat)
    assert best.name == "T=1"
    greedy = setting(GREEDY_POLICY, GREEDY, 1.0, 0.0)
    assert best_static([greedy, *flat]) == best, "greedy is a baseline of its own"
    vendor = setting(VENDOR_POLICY, VENDOR, 0.95, 1.0)
    assert best_static([greedy, vendor, *flat]).name == vendor.name  # type: ignore[union-attr]
    assert best_static([greedy]) is None


def test_one_problem_alone_is_both_halves() -> None:
    only = setting(static_policy(1.0), STATIC, np.ones(1), np.ones(1), problems=1)
    best: Any = best_static([only])
    assert (best.problems, best.accuracy, best.chosen_accuracy) == (1, 1.0, 1.0)


def rendered(found: EvaluationResult, width: int) -> list[str]:
    stream = io.StringIO()
    Console(width=width, file=stream).print(evaluation_table(found))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_setting_with_its_numbers(width: int) -> None:
    found = result(dial=(heads_policy(), heads_policy(0.85), heads_policy(1.0, 0.9)))
    lines = rendered(found, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    (head,) = [line for line in lines if "pass@1" in line]
    assert all(name in head for name in COLUMNS[:5]) and "T " not in head
    for one in found.settings:
        name, accuracy, interval, nats, difference = table_row(one)[:5]
        numbers = rf"\s+{accuracy}\s+{interval}\s+{re.escape(nats)}\s+{re.escape(difference)}\s*"
        assert re.search(rf"^ ?{re.escape(name.split()[0])}.*{numbers}$", text, re.MULTILINE), name
    assert f"{PROBLEMS} problems, 1 sample(s) each, seed 3" in text
    words = " ".join(found.verdict).split()
    assert text.split()[-len(words) :] == words  # the verdict stands below it


def test_bug_a_long_name_pushed_the_numbers_out_of_80_columns() -> None:
    """A vendor with four values was enough: nats were cut and the comparison was not shown."""
    vendor = DecodingPolicy("vendor (T=0.6 P=0.95 k=20 min-p=0.05)", "static")
    made = [*baselines()[2:], setting(vendor, VENDOR, 0.97, 12345.6)]
    made += [setting(heads_policy(0.85, 0.95), HEADS, 0.2, 23456.7)]
    compared = with_comparisons(made, seed=0, resamples=50)
    found = replace(result(), settings=tuple(compared), best_static=best_static(compared))
    assert found.best_static is not None and found.best_static.name == vendor.name
    lines = rendered(found, 80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80 and "…" not in text
    for one in compared:
        for cell in table_row(one)[1:5]:
            assert cell in text
    assert "0.97" in text and text.count("12345.6") == 2 and "[" in text
    names = re.sub(r"\s+", " ", " ".join(line[:30] for line in lines))
    for part in ("min-p=0.05)", "best static (vendor", "heads T×0.85 P×0.95"):
        assert part in names


def test_the_row_of_greedy_has_no_temperature_and_percentages_are_shares() -> None:
    row = dict(zip(COLUMNS, table_row(setting(GREEDY_POLICY, GREEDY, 0.9, 0.0)), strict=True))
    assert (row["T"], row["P"], row["vs curve, points"]) == ("", "", "")
    assert (row["tokens"], row["cut"], row["nats"]) == ("12.5", "25.0%", "0.0")
    static = setting(static_policy(0.7, 0.9), STATIC, 0.5, 3.0)
    row = dict(zip(COLUMNS, table_row(static), strict=True))
    assert (row["T"], row["P"], row["pass@1"]) == ("0.700", "0.900", "0.500")
    assert row["95 %"] == f"{static.low:.3f}-{static.high:.3f}"
    assert len(best_static_row(best_static([static]))) == len(COLUMNS)  # type: ignore[arg-type]


def test_results_are_plain_json_without_the_sample_answers() -> None:
    found = result()
    plain = json.loads(json.dumps(found.to_json()))
    assert [s["policy"]["name"] for s in plain["settings"]] == [s.name for s in found.settings]
    heads = plain["settings"][-1]
    assert heads["against_curve"]["accuracy"]["low"] <= heads["against_curve"]["accuracy"]["high"]
    assert np.mean(heads["correct"]) == pytest.approx(heads["accuracy"], abs=1e-6)
    assert np.mean(heads["entropies"]) == pytest.approx(heads["entropy"], abs=1e-3)
    assert plain["verdict"] == list(found.verdict) and "shown" not in plain
