"""Plain values, from a file or a command line, as those of a `Job`: keys, types, ranges."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from autodeco.errors import UsageError
from autodeco.foreign import check_plain, is_text
from autodeco.job import Job
from autodeco.stopping import parse_duration

_LARGEST = 2**63 - 1
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_STEP = re.compile("[0-9]{1,18}")
_BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "at least"),
    "high": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


def coerce_values(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Checks the keys and types of job values that come from a file or a command line.

    Args:
        values: Field names (``-`` and ``_`` are the same) and plain values.
        where: Named in errors.

    Raises:
        UsageError: An unknown key (the nearest name is suggested), a value of the wrong type, or
            one that is not among the field's choices or not in its range.
    """
    hints = get_type_hints(Job)
    fields = {item.name: item for item in dataclasses.fields(Job)}
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = get_close_matches(name, fields, n=1)
            raise UsageError(
                f"unknown option {key!r}",
                where=where,
                fix=f"did you mean {near[0]!r}?" if near else "see autodeco run --help",
            )
        if name in result:
            raise UsageError(
                f"{name} is given twice, with - and with _", where=where, fix="remove one of them"
            )
        _check_representable(key, value, where)
        result[name] = _coerce(name, value, hints[name], where)
        _check_words(name, result[name], fields, where)
        _check_bounds(key, result[name], fields[name].metadata["bounds"], where)
        choices = fields[name].metadata["choices"]
        if choices and result[name] not in choices:
            near = get_close_matches(str(value), choices, n=1)
            raise UsageError(
                f"{key}: {value!r} is not one of {', '.join(choices)}",
                where=where,
                fix=f"did you mean {near[0]!r}?" if near else f"choose one for {key}",
            )
    return result


def _check_representable(key: str, value: Any, where: str) -> None:
    """Refuses what no file name and no ``job.json`` can hold, whatever the option."""
    if isinstance(value, dict):
        check_plain(value, where)
    problem = ""
    if isinstance(value, int) and abs(value) > _LARGEST:
        problem = "the number has more than 63 bits"
    elif isinstance(value, str | Path) and not is_text(str(value)):
        problem = f"{str(value)[:80]!r} holds a NUL, or bytes that are not UTF-8"
    if problem:
        raise UsageError(f"{key}: {problem}", where=where, fix="give another value")


def _check_words(name: str, value: Any, fields: Mapping[str, Any], where: str) -> None:
    """Checks the fields of text that are not free."""
    if name == "time_limit" and value is not None:
        parse_duration(value)
    if name == "checkpoint" and value not in ("best", "last") and not _STEP.fullmatch(value):
        raise UsageError(
            f"checkpoint: {value!r} is neither best, last nor a step",
            where=where,
            fix="give best, last or a number",
        )
    if name == "name" and value is not None and (Path(value).name != value or value in ".."):
        raise UsageError(
            f"name: {value!r} is no plain name of a directory",
            where=where,
            fix="leave out separators and dots: runs lie in --out/NAME/TIME",
        )
    if name == "allow_change":
        for changed in filter(None, value.replace("-", "_").split(",")):
            if changed not in fields:
                near = get_close_matches(changed, fields, n=1)
                raise UsageError(
                    f"allow_change: no option is called {changed!r}",
                    where=where,
                    fix=f"did you mean {near[0]!r}?" if near else "see autodeco run --help",
                )


def _check_bounds(key: str, value: Any, bounds: Mapping[str, float | None], where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    given = [(*_BOUNDS[side], bound) for side, bound in bounds.items() if bound is not None]
    finite = isinstance(value, int) or math.isfinite(value)
    if finite and all(holds(value, bound) for holds, _, bound in given):
        return
    wanted = " and ".join(f"{word} {bound}" for _, word, bound in given)
    raise UsageError(
        f"{key}: {value!r} is out of range",
        where=where,
        fix=f"give a number {wanted or 'that is finite'}",
    )


def _coerce(name: str, value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) is not dict else ()
    if value is None:
        if type(None) in options:
            return None
    elif Path in (hint, *options):
        if isinstance(value, str | Path):
            return Path(value)
    elif get_origin(hint) is dict:
        if isinstance(value, dict):
            return value
    else:
        wanted = next(t for t in (*options, hint) if t in (str, int, float, bool))
        if isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
            return value
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if wanted is float and isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)  # YAML 1.1 reads 1e-4 as text
        if wanted is str and isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # --checkpoint 300
    raise UsageError(
        f"{name}: {value!r} is a {type(value).__name__}, which does not fit",
        where=where,
        fix=f"give a value of type {getattr(hint, '__name__', hint)}",
    )
