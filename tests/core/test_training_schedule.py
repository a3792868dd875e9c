"""The learning rate of every step: warm-up, cosine, constant tail."""

from __future__ import annotations

import math

import pytest

from autodeco.training.schedule import Schedule


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    schedule = Schedule(1e-3, 1e-5, 20, 50, 1000)
    assert [schedule.rate(step) for step in (0, 9, 19)] == pytest.approx([5e-5, 5e-4, 1e-3])
    assert schedule.rate(20) == 1e-3


def test_between_warm_up_and_tail_it_is_a_cosine() -> None:
    schedule = Schedule(1e-3, 1e-5, 20, 50, 1000)
    for step in range(20, 950):
        share = (step - 20) / 930
        expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * share))
        assert schedule.rate(step) == pytest.approx(expected)


def test_the_last_steps_are_constant_at_the_minimum() -> None:
    schedule = Schedule(1e-3, 1e-5, 20, 50, 1000)
    assert {schedule.rate(step) for step in range(950, 1000)} == {1e-5}
    assert schedule.rate(949) > 1e-5


@pytest.mark.parametrize("total", [1, 2, 3, 10, 40])
def test_bug_a_run_shorter_than_warm_up_and_tail_had_no_cosine(total: int) -> None:
    schedule = Schedule(1e-3, 1e-5, 20, 50, total)
    rates = [schedule.rate(step) for step in range(total)]
    assert max(rates) == 1e-3
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    middle = [rate for rate in rates[total // 2 :] if rate > 1e-5]
    assert len(middle) >= total // 4


def test_the_minimum_may_be_zero_and_the_peak() -> None:
    assert Schedule(1e-3, 0.0, 0, 0, 10).rate(0) == 1e-3
    assert {Schedule(1e-3, 1e-3, 2, 3, 10).rate(step) for step in range(2, 10)} == {1e-3}
