"""Intervals against scipy, the hull against brute force, and settings against the static curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from autodeco.decoding.comparison import (
    CurveComparison,
    _Curves,
    compare_with_curve,
    halves,
    upper_hulls,
)
from autodeco.decoding.statistics import (
    StaticCurve,
    accuracy_interval,
    paired_bootstrap,
    upper_hull,
    wilson_interval,
)

Array = NDArray[np.float64]
GRID = st.integers(0, 6).map(float)  # coarse, so that points tie and lie on lines
POINTS = st.lists(st.tuples(GRID, GRID), min_size=1, max_size=12)


@pytest.mark.parametrize("count", [1, 2, 9, 100, 2048])
def test_wilson_interval_is_scipys(count: int) -> None:
    for right in sorted({0, 1, count // 3, count // 2, count - 1, count}):
        expected = binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson_interval(right / count, count) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_interval_of_no_draw_is_everything_and_it_never_leaves_0_to_1() -> None:
    assert wilson_interval(0.5, 0) == (0.0, 1.0)
    for share in (0.0, 1.0):
        low, high = wilson_interval(share, 7)
        assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
        assert high - low > 0.2


def test_one_sample_a_problem_is_a_plain_wilson_interval() -> None:
    correct = np.array([[1.0]] * 13 + [[0.0]] * 7)
    assert accuracy_interval(correct) == wilson_interval(13 / 20, 20)
    assert accuracy_interval(np.array([[1.0, 0.0, 0.0]])) == wilson_interval(1 / 3, 1)


def test_samples_that_agree_count_as_one_and_independent_ones_as_many() -> None:
    random = np.random.default_rng(0)
    alike = np.repeat((random.random((400, 1)) < 0.6).astype(float), 8, axis=1)
    low, high = accuracy_interval(alike)
    share = float(alike.mean())
    assert (low, high) == pytest.approx(wilson_interval(share, 399), abs=1e-9)  # ddof = 1
    apart = (random.random((400, 8)) < 0.6).astype(float)
    low, high = accuracy_interval(apart)
    few, many = wilson_interval(float(apart.mean()), 400), wilson_interval(apart.mean(), 3200)
    assert high - low < 0.45 * (few[1] - few[0])
    assert high - low == pytest.approx(many[1] - many[0], rel=0.15)


def test_problems_that_all_have_the_same_share_fall_back_to_their_number() -> None:
    correct = np.array([[1.0, 0.0]] * 10)
    assert accuracy_interval(correct) == wilson_interval(0.5, 10)


def test_accuracy_interval_covers_the_true_accuracy_though_samples_depend_on_the_problem() -> None:
    random = np.random.default_rng(1)
    inside, naive, runs = 0, 0, 600
    for _ in range(runs):
        chance = random.beta(1.2, 0.8, size=(60, 1))  # true mean 0.6
        correct = (random.random((60, 8)) < chance).astype(float)
        low, high = accuracy_interval(correct)
        inside += low <= 0.6 <= high
        low, high = wilson_interval(float(correct.mean()), correct.size)
        naive += low <= 0.6 <= high
    assert 0.92 <= inside / runs <= 0.98
    assert naive / runs < 0.8  # what counting every sample would give


def test_paired_bootstrap_is_the_normal_approximation_for_many_problems() -> None:
    difference = np.random.default_rng(2).normal(0.3, 1.0, size=2000)
    value, low, high = paired_bootstrap(difference, seed=5)
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    assert value == pytest.approx(difference.mean())
    assert low == pytest.approx(value - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(value + 1.96 * error, abs=0.15 * error)


def test_paired_bootstrap_covers_the_truth_and_depends_on_the_seed_alone() -> None:
    random = np.random.default_rng(3)
    inside = 0
    for run in range(400):
        difference = random.choice([-1.0, 0.0, 1.0], p=[0.2, 0.5, 0.3], size=120)
        _, low, high = paired_bootstrap(difference, seed=run, resamples=400)
        inside += low <= 0.1 <= high
    assert 0.91 <= inside / 400 <= 0.98
    once, again = (paired_bootstrap(difference, seed=7, resamples=400) for _ in range(2))
    assert once == again != paired_bootstrap(difference, seed=8, resamples=400)
    assert paired_bootstrap(np.full(9, 0.25), seed=0) == pytest.approx((0.25, 0.25, 0.25))


def brute_force_hull(points: list[tuple[float, float]]) -> set[tuple[float, float]]:
    """Corners: no point above, none on or below a segment between two others."""
    corners = set()
    for x, y in set(points):
        others = [point for point in set(points) if point != (x, y)]
        if any(a == x and b > y for a, b in others):
            continue
        covered = any(
            a < x < c and b + (d - b) * (x - a) / (c - a) >= y - 1e-9
            for a, b in others
            for c, d in others
        )
        if not covered:
            corners.add((x, y))
    return corners


@given(POINTS)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_upper_hull_is_what_brute_force_finds(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    hull = upper_hull(x, y)
    assert {points[i] for i in hull} == brute_force_hull(points)
    assert x[hull].tolist() == sorted(set(x[hull].tolist()))  # by entropy, no entropy twice
    for i in hull:
        assert i == points.index(points[i]), "of equal points the first"


@given(POINTS, st.floats(-2, 8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_static_point_and_no_mixture_of_two_is_above_the_hull(
    points: list[tuple[float, float]], at: float
) -> None:
    x, y = np.array(points).T
    curve = StaticCurve.hull(x, y)
    for entropy, accuracy in points:
        assert curve.accuracy_at(entropy)[0] >= accuracy - 1e-9
    mixtures = [
        b + (d - b) * (at - a) / (c - a) for a, b in points for c, d in points if a < at < c
    ]
    best, within = curve.accuracy_at(at)
    assert within == (x.min() <= at <= x.max())
    if mixtures and at not in x:
        assert best == pytest.approx(max(mixtures), abs=1e-9)


@given(st.lists(st.tuples(POINTS, GRID, GRID), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_many_curves_at_once_are_those_one_by_one(rows: list[Any], seed: int) -> None:
    """Rows of different numbers of points: the missing ones repeat the first, which adds none."""
    most = max(len(points) for points, _, _ in rows)
    tables = [np.array([*points, *points[:1] * (most - len(points))]) for points, _, _ in rows]
    x, y = (np.stack([table[:, i] for table in tables]) for i in (0, 1))
    chosen, count = upper_hulls(x, y)
    random = np.random.default_rng(seed)
    drawn_x, drawn_y = (random.integers(0, 7, size=x.shape).astype(float) for _ in range(2))
    entropy, accuracy = (np.array([row[i] for row in rows]) for i in (1, 2))
    curves = _Curves(x, y, drawn_x, drawn_y)
    differences, inside = curves.differences(entropy, accuracy)
    for n in range(len(rows)):
        hull = upper_hull(x[n], y[n])
        assert chosen[n, : count[n]].tolist() == hull
        curve = StaticCurve.through(drawn_x[n, hull], drawn_y[n, hull])
        at_entropy, at_accuracy = curve.accuracy_at(entropy[n]), curve.entropy_at(accuracy[n])
        assert differences[0, n] == pytest.approx(accuracy[n] - at_entropy[0])
        assert differences[1, n] == pytest.approx(entropy[n] - at_accuracy[0])
        assert inside[:, n].tolist() == [at_entropy[1], at_accuracy[1]]


CURVE = StaticCurve.through(np.array([30.0, 0.0, 10.0]), np.array([0.5, 0.8, 0.9]))


@pytest.mark.parametrize(
    ("entropy", "accuracy", "within"),
    [
        (0, 0.8, True),
        (5, 0.85, True),
        (10, 0.9, True),
        (20, 0.7, True),
        (30, 0.5, True),
        (-1, 0.8, False),
        (31, 0.5, False),
    ],
)
def test_accuracy_at_an_entropy(entropy: float, accuracy: float, within: bool) -> None:
    assert CURVE.accuracy_at(entropy) == (pytest.approx(accuracy), within)


@pytest.mark.parametrize(
    ("accuracy", "entropy", "within"),
    [
        (0.9, 10, True),
        (0.8, 15, True),  # the highest entropy with that accuracy, not the left end's 0
        (0.5, 30, True),
        (0.4, 30, False),
        (0.95, 10, False),
    ],
)
def test_entropy_at_an_accuracy(accuracy: float, entropy: float, within: bool) -> None:
    assert CURVE.entropy_at(accuracy) == (pytest.approx(entropy), within)


def test_a_curve_of_one_point_compares_with_that_point() -> None:
    curve = StaticCurve.through(np.array([5.0]), np.array([0.5]))
    assert curve.accuracy_at(5) == (0.5, True) and curve.accuracy_at(6) == (0.5, False)
    assert curve.entropy_at(0.5) == (5.0, True) and curve.entropy_at(0.6) == (5.0, False)


def test_bug_of_equally_accurate_points_the_leftmost_stood_for_a_curve_never_so_accurate() -> None:
    """An accuracy a hair above a plateau was compared with the plateau's lowest entropy."""
    curve = StaticCurve.through(np.array([0.0, 10.0, 20.0]), np.array([0.9, 0.9, 0.5]))
    assert curve.entropy_at(0.9) == (10.0, True)
    assert curve.entropy_at(0.9 + 1e-9) == (10.0, False)


# Static settings with a true curve: accuracy falls as entropy rises.
TRUE_ENTROPY = np.array([0.0, 10.0, 20.0, 30.0])
TRUE_ACCURACY = np.array([0.85, 0.8, 0.65, 0.4])
PROBLEMS = 300


def draw(random: Any, accuracy: Any, entropy: Any, problems: int = PROBLEMS) -> tuple[Array, Array]:
    """Answers [settings, problems] of these accuracies, and noisy entropies."""
    a, e = np.atleast_1d(accuracy)[:, None], np.atleast_1d(entropy)[:, None]
    right = (random.random((len(a), problems)) < a).astype(float)
    return right, np.maximum(e + random.normal(0, 2, size=right.shape) * (e > 0), 0)


def compared(
    seed: int, accuracy: float, entropy: float, resamples: int = 300, **more: Any
) -> CurveComparison:
    random = np.random.default_rng(seed)
    static = draw(random, TRUE_ACCURACY, TRUE_ENTROPY)
    one = draw(random, accuracy, entropy)
    return compare_with_curve(*static, one[0][0], one[1][0], seed=1, resamples=resamples, **more)


def test_a_setting_that_is_on_the_curve_is_not_told_apart_from_it() -> None:
    inside = {"accuracy": 0, "entropy": 0}
    for seed in range(40):
        found = compared(seed, 0.725, 15.0, resamples=150)  # half way between two settings
        for name in inside:
            part = getattr(found, name)
            inside[name] += part.low <= 0 <= part.high
            assert part.within
    assert min(inside.values()) >= 34  # of 40; 95 % coverage gives less with a chance below 0.2 %


def test_one_of_the_curves_own_settings_differs_from_it_by_nothing() -> None:
    random = np.random.default_rng(4)
    right, entropy = draw(random, TRUE_ACCURACY, TRUE_ENTROPY)
    found = compare_with_curve(right, entropy, right[1], entropy[1], seed=0, resamples=100)
    assert found.accuracy.value == pytest.approx(0)
    # In some bootstrap samples the hull goes without it.
    assert found.accuracy.low <= 1e-12 and found.accuracy.high >= -1e-12


def test_a_setting_planted_above_the_curve_is_above_in_both_differences() -> None:
    for seed in range(5):
        found = compared(seed, 0.8, 22.0)
        for part, truth in ((found.accuracy, 0.8 - 0.6), (found.entropy, 22.0 - 10.0)):
            assert 0 < part.low <= part.value <= part.high
            assert part.value == pytest.approx(truth, abs=0.6 * truth)
        best = compared(seed, 0.99, 22.0)
        assert best.entropy.low > 10 and not best.entropy.within  # the curve is never so accurate


def test_a_setting_planted_below_the_curve_is_below_in_both_differences() -> None:
    for seed in range(5):
        found = compared(seed, 0.5, 15.0)
        for part, truth in ((found.accuracy, 0.5 - 0.725), (found.entropy, 15 - 26.0)):
            assert part.low <= part.value <= part.high < 0
            assert part.value == pytest.approx(truth, abs=0.4 * abs(truth)) and part.within


def test_beyond_the_curves_range_the_comparison_is_flagged() -> None:
    assert not compared(0, 0.5, 60.0).accuracy.within
    assert not compared(0, 0.1, 15.0).entropy.within
    static, entropy = np.array([[0.9] * 4, [0.5] * 4]), np.array([[1.0] * 4, [2.0] * 4])
    half_way = np.array([1.5, 2.5, 1.5, 2.5])  # inside on one half of the problems only
    found = compare_with_curve(static, entropy, np.full(4, 0.7), half_way, seed=0, resamples=9)
    assert not found.accuracy.within and found.entropy.within


def test_the_curve_is_chosen_on_one_half_and_judged_on_the_other_both_ways() -> None:
    first, second = halves(20)
    assert sorted([*first, *second]) == list(range(20)) and len(first) == len(second) == 10
    lucky, steady = np.zeros(20), np.tile([1.0, 1.0, 0.0, 0.0, 0.0], 4)
    lucky[first] = 1.0  # right on all of one half, on nothing of the other
    static, entropy = np.stack([lucky, steady]), np.full((2, 20), 5.0)
    judged = np.full(20, 0.7)
    found = compare_with_curve(static, entropy, judged, entropy[0], seed=0, resamples=50)
    # Chosen on the first half: lucky, which is worth 0 on the second. Chosen there: steady.
    curve = (0.0 + float(steady[first].mean())) / 2
    assert curve < 0.3 and found.accuracy.value == pytest.approx(0.7 - curve)
    in_sample = compare_with_curve(
        np.repeat(static[:, first], 2, axis=1), *(entropy, judged, entropy[0]), seed=0, resamples=50
    )
    assert in_sample.accuracy.value == pytest.approx(0.7 - 1.0)


def test_the_best_of_many_equal_settings_does_not_flatter_the_curve() -> None:
    """A hundred settings of accuracy 0.5: the best of them on all problems is far above that."""
    random = np.random.default_rng(6)
    values, flattered = [], []
    for _ in range(20):
        right, entropy = draw(random, [0.5] * 100, [0.0] * 100, 60)
        one = (random.random(60) < 0.5).astype(float)
        found = compare_with_curve(right, entropy, one, entropy[0], seed=0, resamples=2)
        values.append(found.accuracy.value)
        flattered.append(one.mean() - right.mean(1).max())
    error = np.std(values, ddof=1) / np.sqrt(20)
    assert abs(np.mean(values)) < 3 * error < 0.1
    assert np.mean(flattered) < -0.1


def test_a_comparison_depends_on_its_seed_alone() -> None:
    random = np.random.default_rng(7)
    static, one = draw(random, TRUE_ACCURACY, TRUE_ENTROPY), draw(random, 0.7, 15.0)
    found = [
        compare_with_curve(*static, one[0][0], one[1][0], seed=seed, resamples=100)
        for seed in (3, 3, 4)
    ]
    assert found[0] == found[1] and found[0].accuracy != found[2].accuracy
    assert found[0].accuracy.value == found[2].accuracy.value  # the draws move the interval only
    assert found[0].to_json()["accuracy"]["low"] == found[0].accuracy.low


@pytest.mark.parametrize("problems", [1, 2, 3])
def test_few_problems_are_compared_without_a_crash(problems: int) -> None:
    static, entropy = np.ones((2, problems)), np.array([[1.0], [2.0]]) * np.ones(problems)
    zeros, middle = np.zeros(problems), np.full(problems, 1.5)
    found = compare_with_curve(static, entropy, zeros, middle, seed=0, resamples=10)
    assert found.accuracy.value == pytest.approx(-1.0)
