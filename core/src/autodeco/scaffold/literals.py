"""Writes Python values as source that ruff leaves as it is."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from autodeco.family import FromConfig

WIDTH = 100


@dataclass(frozen=True)
class Raw:
    """Source that stands as it is."""

    text: str


@dataclass(frozen=True)
class Comment:
    """A comment of one line before the next item."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        name: Of the function, with a star before it where it is unpacked.
        args: By position.
        kwargs: By name.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lines:
    """A tuple with an item on each line, however short."""

    items: tuple[Any, ...]


def quoted(text: str) -> str:
    """Returns a string's literal, raw where it has backslashes."""
    plain = repr(text)
    if "\\" in text and text.isprintable():
        given = f'r"{text}"'
    else:
        given = '"' + plain[1:-1].replace("\\'", "'") + '"'
    # A text of a stranger's config.json must stay one, whatever it holds.
    return given if _means(given, text) else plain


def _means(literal: str, text: str) -> bool:
    try:
        return bool(ast.literal_eval(literal) == text)
    except (SyntaxError, ValueError):
        return False


def source(value: Any, indent: int = 0, head: str = "", tail: str = "") -> list[str]:
    """Returns the lines of a value between a head and a tail.

    What does not fit on a line is written item by item, each with a comma, which ruff keeps so.

    Args:
        value: Of plain types, `Raw`, `Call`, `Lines` or `FromConfig`.
        indent: Of the first line.
        head, tail: Stand before and behind it.
    """
    space = " " * indent
    if isinstance(value, Comment):
        return [f"{space}# {' '.join(value.text.splitlines())}"]
    flat = None if isinstance(value, Lines) else _flat(value)
    if flat is not None and len(space + head + flat + tail) <= WIDTH:
        return [space + head + flat + tail]
    opener, closer, items = _items(value)
    if not opener:
        return [space + head + (flat or "") + tail]
    lines = [space + head + opener]
    for key, item in items:
        lines += source(item, indent + 4, key, ",")
    return [*lines, space + closer + tail]


def _flat(value: Any) -> str | None:
    """The value on one line; None: it has comments."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Comment | Lines):
        return None
    opener, closer, items = _items(value)
    if not opener:
        odd = isinstance(value, float) and not math.isfinite(value)
        return f'float("{value}")' if odd else repr(value)
    parts = [(key, _flat(item)) for key, item in items]
    if any(part is None for _, part in parts):
        return None
    comma = "," if opener == "(" and len(parts) == 1 else ""
    return opener + ", ".join(f"{key}{part}" for key, part in parts) + comma + closer


def _items(value: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """What it opens and closes with, and what is between: head and value of each."""
    if isinstance(value, FromConfig):
        value = _from_config(value)
    if isinstance(value, Call):
        named = [(f"{key}=", item) for key, item in value.kwargs.items()]
        return f"{value.name}(", ")", [*(("", item) for item in value.args), *named]
    if isinstance(value, Mapping):
        return "{", "}", [(f"{quoted(str(key))}: ", item) for key, item in value.items()]
    if isinstance(value, Lines):
        return "(", ")", [("", item) for item in value.items]
    if isinstance(value, tuple):
        return "(", ")", [("", item) for item in value]
    if isinstance(value, list):
        return "[", "]", [("", item) for item in value]
    if is_dataclass(value) and not isinstance(value, Raw | Comment | type):
        return _items(Call(type(value).__name__, (), dict(_changed(value))))
    return "", "", []


def _from_config(value: FromConfig) -> Call:
    given = dict(_changed(value))
    args = [given.pop("key")]
    if "default" in given:
        args.append(given.pop("default"))
    return Call("FromConfig", tuple(args), given)


def _changed(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass that are not at their defaults."""
    for item in fields(value):
        now = getattr(value, item.name)
        if now != item.default:
            yield item.name, now
