"""What an answer's text says its answer is, and whether that is the ground truth."""

from __future__ import annotations

import sys
import types
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco.decoding.answers import (
    METHODS,
    as_number,
    check,
    extract_answer,
    find_numbers,
    require_method,
    same_answer,
)
from autodeco.errors import EnvironmentProblem, UsageError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} is wrong, \boxed{2} is right, not 3", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{ {a} {b{c}} }", "{a} {b{c}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and then \boxed{8", "7"),  # cut off: the last closed one
        (r"\boxed{8 and 9", "9"),
        (r"\boxed{4}, so the answer is 5", "4"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_closed_box_is_the_answer_with_the_braces_in_it(text: str, found: str) -> None:
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 7.", "7"),
        ("the ANSWER  is: 7 apples, of 12", "7"),
        ("The answer is 3? No, the answer is 4. I had 9 before.", "4"),
        ("The final answer is\n\n  1,234.5 m", "1,234.5"),
        ("The answer is Paris, France. It is large.", "Paris, France"),
        ("The answer is blue; red would be wrong", "blue"),
        ("The answer is **12**", "12"),
        ("The answer is", None),
        ("3 is close, but the answer is \n", None),  # cut off: not what stood before
    ],
)
def test_what_follows_the_last_answer_is(text: str, found: str | None) -> None:
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("First 3, then 4", "4"),
        ("2 + 3 = 5.", "5"),
        ("It costs $1,200.50 a year", "1,200.50"),
        ("a list 1,2,3", "3"),
        ("odd groups 1,2000", "2000"),
        ("half: 1/2", "1/2"),
        ("no leading zero: .75!", ".75"),
        ("#### 18", "18"),
        ("nothing to see", None),
        ("", None),
        ("- . / , %", None),
    ],
)
def test_without_either_the_last_number_is_the_answer(text: str, found: str | None) -> None:
    assert extract_answer(text) == found
    assert found is None or check(text, found)
    assert not check(text, "17")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("x = -3", ["-3"]),
        ("5-3", ["5", "3"]),
        ("5 - 3 = +2", ["5", "3", "+2"]),
        ("(a)-3, ABC-9", ["3", "9"]),
        ("from -5 to 5", ["-5", "5"]),
        ("[-1, -2.5]", ["-1", "-2.5"]),
        ("5 -3", ["5", "3"]),
    ],
)
def test_a_minus_sign_is_told_from_a_dash(text: str, numbers: list[str]) -> None:
    assert find_numbers(text) == numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567", Fraction(1234567)),
        ("1200.0", Fraction(1200)),
        ("-0.125", Fraction(-1, 8)),
        ("+7", Fraction(7)),
        ("3.", Fraction(3)),
        (".5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("- 3 / 4", Fraction(-3, 4)),
        ("2.5/5", Fraction(1, 2)),
        ("50%", Fraction(1, 2)),
        (r"12.5\%", Fraction(1, 8)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\tfrac{ -10 }{ 4 }", Fraction(-5, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"$\text{42}$", Fraction(42)),
        (r"1\,000", Fraction(1000)),
        ("1/0", None),
        ("1/2/3", None),
        ("1,23", None),
        ("1e5", None),
        ("x", None),
        ("1 apple", None),
        ("", None),
    ],
)
def test_numbers_are_exact_fractions(text: str, value: Fraction | None) -> None:
    assert as_number(text) == value


@given(st.fractions(max_denominator=10**6), st.integers(0, 6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_way_to_write_a_number_is_the_same_number(value: Fraction, digits: int) -> None:
    top, bottom = value.numerator, value.denominator
    rounded = round(value, digits)
    assert as_number(f"{top}/{bottom}") == as_number(rf"\frac{{{top}}}{{{bottom}}}") == value
    decimal = f"{float(rounded):,.{digits}f}"
    assert as_number(decimal) == Fraction(decimal.replace(",", ""))
    assert check(f"The answer is {decimal}.", decimal.replace(",", ""))
    assert check(f"so we get {top}/{bottom} of it", str(value))
    assert not check(f"so we get {top}/{bottom} of it", str(value + 1))


@pytest.mark.parametrize(
    ("found", "gt", "same"),
    [
        ("1,200", "1200.0", True),
        ("1/2", "0.5", True),
        ("1/3", "0.333", False),
        ("007", "7", True),
        ("Paris", " paris ", True),
        ("Paris", "London", False),
        (r"\text{blue}", "blue", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"\frac{x}{2}", "x/2", True),
        ("x + 1", "x+1", True),
        ("x + 1", "1+x", False),  # that needs math-verify
        ("42", "forty-two", False),
        ("", "0", False),
    ],
)
def test_numbers_are_compared_as_numbers_and_all_else_as_text(
    found: str, gt: str, same: bool
) -> None:
    assert same_answer(found, gt) == same == same_answer(gt, found)


@pytest.mark.parametrize(
    ("text", "gt", "right"),
    [
        ("The answer is 50%.", "50%", True),
        (r"that makes 50\%", "0.5", True),
        (r"\boxed{50\%}", "50", True),
        ("The answer is 50", "50%", True),
        ("The answer is 25 %.", "1/4", True),
        ("The answer is 50%.", "5", False),
        ("The answer is 5%.", "50%", False),
        ("The answer is 0.5", "50", False),  # no percent sign anywhere
    ],
)
def test_bug_the_percent_sign_outside_a_box_was_lost(text: str, gt: str, right: bool) -> None:
    """ "50%" in a sentence was read as 50, which is not the ground truth "50%"."""
    assert check(text, gt) == right


@pytest.mark.parametrize(
    ("text", "gt", "wrong"),
    [
        (r"The answer is $\frac{3}{4}$.", "3/4", "3"),
        (r"we get $-\dfrac{3}{4}$", "-0.75", "4"),
        (r"in all \frac{10}{4}", "2.5", "4"),
        (r"The answer is \frac34.", "0.75", "34"),
    ],
)
def test_bug_a_latex_fraction_outside_a_box_was_read_as_one_of_its_parts(
    text: str, gt: str, wrong: str
) -> None:
    """Its numerator counted as the answer, or its denominator."""
    assert check(text, gt) and not check(text, wrong)


@pytest.mark.parametrize(
    "text", [r"\boxed{2\frac{1}{2}}", r"\boxed{2 1/2}", r"it is 2\frac{1}{2}", "answer is 2 1/2"]
)
def test_bug_a_mixed_number_was_read_as_its_digits_side_by_side(text: str) -> None:
    """2 1/2 was 21/2."""
    assert check(text, "2.5") and check(text, "5/2")
    assert not check(text, "10.5") and not check(text, "2")
    negative = text.replace("2", "-2", 1)
    assert check(negative, "-2.5") and not check(negative, "-1.5")


def test_bug_a_negative_number_behind_a_word_lost_its_sign() -> None:
    for text in ("The total is -3.", "temperature of -3", "it drops to \N{MINUS SIGN}3"):
        assert check(text, "-3") and not check(text, "3")


def test_bug_a_number_of_thousands_of_digits_stopped_the_evaluation() -> None:
    """A model that repeats one digit to the end: Python refuses to read such a number."""
    assert as_number("1" * 5000) is None
    assert not check("1" * 5000, "1") and not check("1/" + "3" * 5000, "1")
    assert check("1" * 5000, "1" * 5000)


def test_bug_the_end_of_a_date_was_no_number() -> None:
    assert find_numbers("on 3/14/2015") == ["3/14", "2015"]


def test_bug_a_comma_that_latex_keeps_together_was_no_thousands_separator() -> None:
    assert check(r"\boxed{1{,}200}", "1200") and check("in all $1{,}200$", "1,200")


def test_an_unknown_method_is_a_usage_error_that_lists_them() -> None:
    for call in (lambda: check("1", "1", "magic"), lambda: require_method("magic")):
        with pytest.raises(UsageError, match="'magic'") as caught:
            call()
        assert all(method in str(caught.value.fix) for method in METHODS)
    require_method("auto")


def test_without_math_verify_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)  # an import of it fails
    with pytest.raises(EnvironmentProblem, match="math-verify is not installed") as caught:
        require_method("math-verify")
    assert "autodeco[eval]" in str(caught.value.fix) and "auto" in str(caught.value.fix)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A math_verify that keeps what it was asked, and says yes to equal texts."""
    asked: list[Any] = []
    module: Any = types.ModuleType("math_verify")
    module.parse = lambda text: [text]
    module.verify = lambda gold, target: asked.append((gold, target)) or gold == target
    monkeypatch.setitem(sys.modules, "math_verify", module)
    return asked


def test_math_verify_is_given_the_ground_truth_first(stand_in: list[Any]) -> None:
    assert check("$7$", "$7$", "math-verify") is True
    assert check("it is 8", "$7$", "math-verify") is False
    assert stand_in == [(["$7$"], ["$7$"]), (["$7$"], ["it is 8"])]


def test_bug_math_verify_does_not_read_bare_latex_as_a_ground_truth(stand_in: list[Any]) -> None:
    r"""Without dollars it reads ``2\sqrt{3}`` as 2 and ``\sqrt{2}`` as nothing."""
    for gt in (r"2\sqrt{3}", "7"):
        check("", gt, "math-verify")
        assert stand_in.pop()[0] == [f"${gt}$"]
    for gt in ("$7$", r"\boxed{7}", r"\(7\)", r"\[7\]"):
        check("", gt, "math-verify")
        assert stand_in.pop()[0] == [gt]


@pytest.mark.parametrize(
    ("text", "gt", "right"),
    [
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", True),
        (r"\boxed{2}", r"2\sqrt{3}", False),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}", True),
        (r"\boxed{1 + x}", "x+1", True),
        ("so it is 0.5", r"\frac{1}{2}", True),
        ("The answer is 1200.", "1,200", True),
        (r"\boxed{3}", r"\frac{3}{4}", False),
    ],
)
def test_math_verify_itself_agrees_where_it_is_installed(text: str, gt: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert check(text, gt, "math-verify") is right


def test_bug_many_unclosed_boxes_took_the_square_of_their_number() -> None:
    import time

    text = r"\boxed{3} " + r"\boxed{ {" * 40_000
    began = time.process_time()
    assert extract_answer(text) == "3"
    assert time.process_time() - began < 2
    assert extract_answer("} } " + r"\boxed{a\boxed{b}c} \boxed{") == "b"
