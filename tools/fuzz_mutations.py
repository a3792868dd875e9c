"""Spoils files: bytes, values in JSON, headers of safetensors files; for ``fuzz.py`` and tests."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

#: Put in the place of a value; texts in angle brackets stand for what `json.dumps` does not write.
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.0, 1.5, -0.5, 1e308, 10**9, 10**12, 10**30, -(10**20)),
    *(2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *("", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\\b", "C:x", "~", "-"),
    *("a\nb", "\0", "\x1b[2J", "\ud800", "\udcff", "x" * 300, "x" * 70000, "é", "0", "1", "NaN"),
    *("model.safetensors", "config.json", "float32", "BF16", "true", "null", "auto", "%s", "{0}"),
    *([], {}, [[]], [None], [1], [-1], ["x"], [1, 2, 3], ["../x"], {"": 0}, {"a": 1}, {"a": []}),
    *("<NaN>", "<Infinity>", "<-Infinity>", "<-0>", "<1e999>", "<0x10>", "<deep>", "<digits>"),
    "<deeper>",
)
_RAW = {
    **{f"<{text}>": text for text in ("NaN", "Infinity", "-Infinity", "-0", "1e999", "0x10")},
    "<deep>": "[" * 300 + "]" * 300,
    "<deeper>": '{"a":' * 20000 + "0" + "}" * 20000,
    "<digits>": "9" * 6000,
}
_TWICE = "<twice>"
_PIECES = (
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"{", b"}", b"[", b"]"),
    *(b'"', b",", b":", b"\\", b"\\ud800", b"NaN", b"-", b"9" * 40, b"null", b"true", b"../"),
)

Mutation = Callable[[bytes, random.Random], bytes]


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Changes, cuts, doubles, or inserts some bytes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 8, 64, 1000)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(content):
            content[at] = rng.randrange(256)
        elif kind == 2:
            del content[at:end]
        elif kind == 3:
            content[at:at] = content[at:end] or b"\0"
        elif kind == 4:
            content[at:at] = rng.choice(_PIECES)
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def spoil_json(data: bytes, rng: random.Random) -> bytes:
    """Changes the value, the name or the number of some things in a JSON text."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return spoil_bytes(data, rng)
    if rng.random() < 0.15:
        return spoil_bytes(data, rng)
    holder = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _spoil_one(holder, rng)
    text = json.dumps(holder[0])
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return re.sub(_TWICE + r"\d*", "", text).encode()


def _weird(rng: random.Random) -> Any:
    return deepcopy(rng.choice(WEIRD))


def _spoil_one(holder: list[Any], rng: random.Random) -> None:
    parent: Any = holder
    key: Any = 0
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    kind = rng.random()
    if isinstance(parent, dict) and kind < 0.12:
        del parent[key]
    elif isinstance(parent, dict) and kind < 0.22:
        parent[str(key) + _TWICE] = rng.choice((deepcopy(parent[key]), _weird(rng)))
    elif isinstance(parent, dict) and kind < 0.3:
        parent[rng.choice(("", "x", "../x", "__metadata__", "\ud800", str(key)[:-1]))] = parent.pop(
            key
        )
    elif isinstance(parent, list) and kind < 0.15 and parent is not holder:
        del parent[key]
    elif isinstance(parent[key], int) and kind < 0.45:
        parent[key] += rng.choice((-1, 1, -8, 8, 1000))
    elif isinstance(parent[key], (dict, list)) and kind < 0.4:
        parent[key] = [parent[key]]
    else:
        parent[key] = _weird(rng)


def spoil_lines(data: bytes, rng: random.Random) -> bytes:
    """Spoils one line, as JSON mostly, or all of the text."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    kind = rng.random()
    if kind < 0.15:
        return spoil_bytes(data, rng)
    if kind < 0.25:
        return rng.choice((b"\r\n", b"\n\n", b"\r", b"\n\xef\xbb\xbf")).join(lines)
    lines[number] = spoil_json(lines[number], rng) if kind < 0.9 else rng.randbytes(40)
    return b"\n".join(lines)


def spoil_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Spoils the header, its length, or the bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return spoil_bytes(data, rng)
    if kind < 0.3:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 10**8, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + header + body
    if kind < 0.4:
        return data[: 8 + length] + rng.choice((body[:-1], body + b"\0", b"", body * 2))
    if kind < 0.45:
        new = header.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    else:
        new = spoil_json(header, rng)
    if rng.random() < 0.5:  # the library pads a header; what is behind it stays aligned
        new += b" " * (-len(new) % 8)
    return struct.pack("<Q", len(new)) + new + body


def mutation_of(name: str) -> Mutation:
    """Returns how a file of this name is spoiled best."""
    if name.endswith(".safetensors"):
        return spoil_safetensors
    if name.endswith(".jsonl"):
        return spoil_lines
    return spoil_json if name.endswith(".json") else spoil_bytes
