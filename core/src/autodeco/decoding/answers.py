"""Whether an answer's text states the ground truth.

Three steps find what was answered: the last ``\\boxed{...}``, else what follows the last
"answer is", else the last number. Two numbers are compared as exact fractions ("1,200" is "1200.0"
and "1/2" is "0.5"), anything else as normalised strings. ``math-verify`` compares as mathematics.
"""

from __future__ import annotations

import re
from fractions import Fraction

from autodeco.errors import EnvironmentProblem, UsageError

METHODS = ("auto", "math-verify")

_NUMBER = (
    r"[-+]?(?:\d+ +(?=\d+\s*/\s*\d))?"  # the whole of a mixed number
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s*/\s*\d+(?:\.\d+)?)?(?:\s*\\?%)?"
)
_ANSWER_IS = re.compile(r"answer\s+is\s*:?", re.IGNORECASE)
_PART = r"\s*(?:\{([^{}]+)\}|(\d))"
_LATEX_FRACTION = re.compile(r"(\d\s*)?\\[dt]?frac" + _PART + _PART)
_BOXED = re.compile(r"\\boxed\{")
_BRACE = re.compile(r"[{}]")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")


def check(text: str, gt: str, method: str = "auto") -> bool:
    """Whether ``text`` answers ``gt``.

    Args:
        text: the generated answer, without its prompt.
        gt: the ground truth.
        method: "auto", or "math-verify" (the package of that name must be installed).

    Raises:
        UsageError: unknown method.
        EnvironmentProblem: math-verify is asked for and not installed.
    """
    if method == "auto":
        found = extract_answer(text)
        return found is not None and same_answer(found, gt)
    if method == "math-verify":
        return _math_verify(text, gt)
    raise UsageError(
        f"unknown way to check answers {method!r}", fix=f"use one of {', '.join(METHODS)}"
    )


def require_method(method: str) -> None:
    """Raises what :func:`check` would raise, before any answer was sampled."""
    check("1", "1", method)


def extract_answer(text: str) -> str | None:
    """What ``text`` gives as its answer, or None if it gives none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    text = _plain(text)
    said = [match.end() for match in _ANSWER_IS.finditer(text)]
    if said:
        rest = text[said[-1] :].strip()
        line = rest.splitlines()[0] if rest else ""
        numbers = find_numbers(line)
        return numbers[0] if numbers else re.split(r"[.;]\s|[.;]$", line)[0].strip() or None
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def same_answer(found: str, gt: str) -> bool:
    """Whether two answers agree: as numbers if both are, otherwise as normalised strings.

    Where only one of them has a percent sign, "50%" is both "0.5" and "50".
    """
    a, b = as_number(found), as_number(gt)
    if a is None or b is None:
        return _normalise(found) == _normalise(gt)
    one, other = (_strip(text).endswith("%") for text in (found, gt))
    return a == b or (one != other and a * 100**one == b * 100**other)


def find_numbers(text: str) -> list[str]:
    """The numbers in ``text``, in order.

    A minus sign right behind a word, and one between two numbers, is none ("well-3", "5 -3").
    """
    found = []
    for match in re.finditer(_NUMBER, text):
        number = match.group()
        if number[0] in "+-":
            before = text[: match.start()]
            last = before.rstrip()[-1:]
            if before[-1:].isalnum() or last.isdigit() or last == ")":
                number = number[1:]
        found.append(number)
    return found


def as_number(text: str) -> Fraction | None:
    """The exact value of a number, a fraction or a percentage; None if ``text`` is neither."""
    text = _plain(_strip(text))
    percent = text.endswith("%")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.rstrip("%").strip())
    text = re.sub(r"\s*/\s*", "/", text)
    try:
        mixed = re.fullmatch(r"([-+]?)\s*(\d+) +(\d+)/(\d+)", text)
        if mixed is not None:
            sign, whole, top, bottom = mixed.groups()
            value = Fraction(f"{sign}1") * (int(whole) + Fraction(int(top), int(bottom)))
        else:
            parts = text.replace(" ", "").split("/")
            good = all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", part) for part in parts)
            if len(parts) > 2 or not good:
                return None
            value = Fraction(parts[0]) / (Fraction(parts[1]) if len(parts) == 2 else 1)
    except (ZeroDivisionError, ValueError):  # ValueError: Python reads no number of 5,000 digits
        return None
    return value / 100 if percent else value


def _plain(text: str) -> str:
    """LaTeX fractions as a/b (with a whole number before it "n a/b"), one kind of minus sign."""

    def fraction(match: re.Match[str]) -> str:
        whole, *parts = match.groups()
        top, bottom = (part for part in parts if part is not None)
        return f"{whole.rstrip()} {top}/{bottom}" if whole else f"{top}/{bottom}"

    return _LATEX_FRACTION.sub(fraction, text.replace("\N{MINUS SIGN}", "-").replace("{,}", ","))


def _strip(text: str) -> str:
    text = _WRAPPER.sub(r"\1", text).replace("\\%", "%").replace("\\!", "").replace("\\,", "")
    return text.strip().strip("$").rstrip(".").strip()


def _normalise(text: str) -> str:
    text = _plain(_strip(text)).replace("\\left", "").replace("\\right", "")
    return re.sub(r"\s+", "", text).casefold()


def _last_boxed(text: str) -> str | None:
    """The content of the last closed ``\\boxed{...}``, braces inside it matched."""
    begins = {match.end() for match in _BOXED.finditer(text)}
    if not begins:
        return None
    open_braces: list[int] = []  # where the content of each begins
    last, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            open_braces.append(brace.end())
        elif open_braces:
            begin = open_braces.pop()
            if begin in begins and begin > last:
                last, end = begin, brace.start()
    return text[last:end] if last >= 0 else None


def _math_verify(text: str, gt: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise EnvironmentProblem(
            "math-verify is not installed",
            fix="pip install 'autodeco[eval]', or check answers with the method auto",
        ) from error
    # Bare LaTeX is not read as such: without dollars "2\sqrt{3}" would be 2.
    if not any(mark in gt for mark in ("$", "\\boxed", "\\(", "\\[")):
        gt = f"${gt}$"
    return bool(verify(parse(gt), parse(text)))
