"""What stands in a file that somebody else wrote: JSON that means one thing, names that stay.

A name in an index or a manifest is a plain name of a file beside it, never a path. Symbolic links
in a directory are followed: the hub's cache is made of links to ``../../blobs``, and a link comes
from whoever set up the disk, not from what is written in a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autodeco.errors import UsageError

_LONGEST_NAME = 255  # bytes, on all usual filesystems
_MOST_VALUES, _DEEPEST = 100_000, 50  # in a configuration
_LARGEST = 2**63 - 1


def is_plain_name(name: object) -> bool:
    """Whether a value names a file in its own directory, on every system.

    Separators and drive letters of other systems, control characters, ``.`` and ``..`` are not in
    such a name.
    """
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    if any(c in "/\\:" or ord(c) < 32 or ord(c) == 127 for c in name):
        return False
    try:
        return len(name.encode("utf-8")) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half a character
        return False


def check_plain(value: Any, where: str) -> None:
    """Checks that a value is one that JSON can hold, and as small as a configuration is.

    YAML has dates, sets and objects, and what its anchors repeat is small in the file and in
    memory, but not once it is printed or written.

    Raises:
        UsageError: It is not; the text says why.
    """
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        wrong = ""
        if count > _MOST_VALUES or depth > _DEEPEST:
            wrong = "it holds more than a configuration does, counted with all that is repeated"
        elif isinstance(one, dict):
            if depth and not all(isinstance(name, str) for name in one):
                wrong = f"{next(n for n in one if not isinstance(n, str))!r} is no text, but a name"
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            left += [(part, depth + 1) for part in one]
        elif isinstance(one, str):
            wrong = "" if is_text(one) else f"{one[:80]!r} is no text that can be written"
        elif one is not None and not isinstance(one, bool | int | float):
            wrong = f"a {type(one).__name__} stands in it, which no option takes"
        elif isinstance(one, int) and abs(one) > _LARGEST:
            wrong = "a number in it has more than 63 bits"
        if wrong:
            raise UsageError(
                f"the configuration cannot be used: {wrong}", where=where, fix="correct the file"
            )


def is_text(value: str) -> bool:
    """Whether a text can be a file's name, and be written in UTF-8."""
    try:
        return "\0" not in value and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def plain_json(path: Path) -> Any:
    """Parses a JSON file as Python does, but for text that cannot be written again.

    Raises:
        OSError: It cannot be read, or is no regular file: a pipe, or a device that never ends.
        ValueError: It is malformed, too deep, or holds half a character.
    """
    if path.exists() and not path.is_file():
        raise OSError("this is no regular file")
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def strict_json(text: bytes) -> Any:
    """Parses JSON that can be read in one way only.

    Python's parser takes the last of several values of one name, NaN, UTF-16 and half characters;
    other parsers do not, and two readers that differ can be told different things by one file.

    Raises:
        ValueError: It is malformed, too deep, or one of these; the text says what.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=each_once,
            parse_int=_whole,
            parse_constant=_no_number,
        )
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's names and values, for `json.loads`; two of one name are a ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:80]!r} stands there twice")
            seen.add(name)
    return found


def _whole(text: str) -> int:
    if text == "-0":  # a float, to other parsers
        raise ValueError("-0 is no whole number")
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
