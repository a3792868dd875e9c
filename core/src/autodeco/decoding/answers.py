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

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+(?:\.\d+)?)?"
_ANSWER_IS = re.compile(r"answer\s+is\s*:?", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
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
    said = [match.end() for match in _ANSWER_IS.finditer(text)]
    if said:
        rest = text[said[-1] :].strip()
        line = rest.splitlines()[0] if rest else ""
        numbers = find_numbers(line)
        return numbers[0] if numbers else re.split(r"[.;]\s|[.;]$", line)[0].strip() or None
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def same_answer(found: str, gt: str) -> bool:
    """Whether two answers agree: as numbers if both are, otherwise as normalised strings."""
    a, b = as_number(found), as_number(gt)
    if a is not None and b is not None:
        return a == b
    return _normalise(found) == _normalise(gt)


def find_numbers(text: str) -> list[str]:
    """The numbers in ``text``, in order; a minus sign between two words or digits is none."""
    found = []
    for match in re.finditer(_NUMBER, text):
        number = match.group()
        if not any(c.isdigit() for c in number):
            continue
        before = text[: match.start()].rstrip()[-1:]
        if number[0] in "+-" and (before.isalnum() or before == ")"):
            number = number[1:]
        found.append(number)
    return found


def as_number(text: str) -> Fraction | None:
    """The exact value of a number, a fraction or a percentage; None if ``text`` is neither."""
    text = _LATEX_FRACTION.sub(r"\1/\2", _strip(text))
    percent = text.endswith("%")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.rstrip("%")).replace(" ", "")
    parts = text.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", part) for part in parts):
        return None
    try:
        value = Fraction(parts[0]) / (Fraction(parts[1]) if len(parts) == 2 else 1)
    except ZeroDivisionError:
        return None
    return value / 100 if percent else value


def _strip(text: str) -> str:
    text = _WRAPPER.sub(r"\1", text).replace("\\%", "%").replace("\\!", "").replace("\\,", "")
    return text.strip().strip("$").rstrip(".").strip()


def _normalise(text: str) -> str:
    text = _LATEX_FRACTION.sub(r"\1/\2", _strip(text)).replace("\\left", "").replace("\\right", "")
    return re.sub(r"\s+", "", text).casefold()


def _last_boxed(text: str) -> str | None:
    """The content of the last closed ``\\boxed{...}``, braces inside it matched."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position]
        start = text.rfind("\\boxed{", 0, start)
    return None


def _math_verify(text: str, gt: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise EnvironmentProblem(
            "math-verify is not installed",
            fix="pip install 'autodeco[eval]', or check answers with the method auto",
        ) from error
    return bool(verify(parse(gt), parse(text)))
