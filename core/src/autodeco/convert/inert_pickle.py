"""Reads a pickle as data: nothing is imported, constructed or called, whatever it asks for.

A pickle is a program. This runs the few instructions that plain records need and puts an `Inert`
wherever the program would have called something: the name of what was to be called, and what it was
to be called with. Only names on the caller's list may be asked for.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Collection
from typing import Any

from autodeco.errors import WeightsError

MOST_BYTES = 256 << 20
# of the instructions; a record of a chunk of a tensor takes about 60
_MOST_STEPS = 40_000_000
_ORDERED = "collections.OrderedDict"
_MARK = object()


class Pairs(list[tuple[Any, Any]]):
    """A dictionary, as its items: forged keys are not even hashed."""


class Global:
    """A name that a pickle asks for: module and attribute, with a dot between them."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Inert:
    """An object that would have been constructed.

    Attributes:
        name: Of what would have been called.
        args: Of the call.
        state: What would have been put into the result; None: nothing.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None

    def fields(self) -> dict[str, Any]:
        """Returns the state as a plain object has it: attribute -> value; {}: it is another."""
        if not isinstance(self.state, Pairs):
            return {}
        return {key: value for key, value in self.state if isinstance(key, str)}


def read_pickle(data: bytes, allowed: Collection[str], where: str) -> Any:
    """Runs a pickle.

    Args:
        data: All of it.
        allowed: The names that it may ask for, ``module.attribute``.
        where: For errors.

    Returns:
        None, bool, int, float, str, list and tuple as they are; `Pairs` for a dictionary, `Global`
        for a name, `Inert` for everything else.

    Raises:
        WeightsError: It is too large, damaged, asks for another name, or has an instruction that no
            plain record needs.
    """
    if len(data) > MOST_BYTES:
        raise _refused(f"the pickle has {len(data):,} bytes; {MOST_BYTES:,} are read", where)
    machine = _Machine(data, frozenset(allowed), where)
    try:
        return machine.run()
    except (IndexError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise _refused(f"the pickle is damaged at byte {machine.at}", where) from error


def _refused(what: str, where: str) -> WeightsError:
    fix = "it is damaged, forged or of an unknown version: fetch or write the checkpoint again"
    return WeightsError(what, where=where, fix=fix)


class _Machine:
    """A stack machine; every method of the table below is one instruction."""

    def __init__(self, data: bytes, allowed: frozenset[str], where: str) -> None:
        self.data, self.allowed, self.where, self.at = data, allowed, where, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}

    def run(self) -> Any:
        """Runs to the end and returns what is left."""
        data, table = self.data, _TABLE
        for _ in range(_MOST_STEPS):
            code = data[self.at]
            self.at += 1
            step = table.get(code)
            if step is not None:
                step(self)
            elif code == pickle.STOP[0]:
                result = self.pop()
                if self.stack:
                    raise ValueError("more than one value is left")
                return result
            else:
                raise _refused(
                    f"the pickle has the instruction {code:#04x} at byte {self.at - 1}, which no "
                    "plain record needs",
                    self.where,
                )
        raise _refused(f"the pickle has more than {_MOST_STEPS:,} instructions", self.where)

    def take(self, size: int) -> bytes:
        """Returns the next bytes."""
        if not 0 <= size <= len(self.data) - self.at:
            raise ValueError("cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str, size: int) -> Any:
        """Returns the number in the next bytes."""
        return struct.unpack(form, self.take(size))[0]

    def line(self) -> str:
        """Returns the text up to the end of the line."""
        end = self.data.index(b"\n", self.at)
        text = self.take(end - self.at).decode("utf-8")
        self.at += 1
        return text

    def pop(self) -> Any:
        """Takes the uppermost value."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark is no value")
        return value

    def above_mark(self) -> list[Any]:
        """Takes everything above the last mark, and the mark."""
        stack, place = self.stack, len(self.stack) - 1
        while stack[place] is not _MARK:
            if place == 0:
                raise ValueError("no mark")
            place -= 1
        values = stack[place + 1 :]
        del stack[place:]
        return values

    def skip(self, size: int) -> None:
        """Passes over bytes that say nothing."""
        self.take(size)

    def push_tuple(self, size: int) -> None:
        """Makes a tuple of the uppermost values."""
        values = tuple(self.pop() for _ in range(size))
        self.stack.append(values[::-1])

    def text(self, size: int) -> None:
        """Pushes a text of so many bytes."""
        self.stack.append(self.take(size).decode("utf-8", "surrogatepass"))

    def whole_number(self, size: int) -> None:
        """Pushes a whole number of so many bytes."""
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def ask(self, module: Any, name: Any) -> None:
        """Pushes a name, if it is on the list."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name is a text")
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise _refused(
                f"the pickle asks for {full[:200]!r}, which is not on the list", self.where
            )
        self.stack.append(self.globals.setdefault(full, Global(full)))

    def ask_stacked(self) -> None:
        """Takes module and name from the stack and asks for it."""
        name, module = self.pop(), self.pop()
        self.ask(module, name)

    def put(self, place: int) -> None:
        """Remembers the uppermost value."""
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError("a mark is no value")
        self.memo[place] = value

    def call(self) -> None:
        """Puts an `Inert` where a call would be."""
        args, callee = self.pop(), self.pop()
        if not isinstance(callee, Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is no name")
        empty = callee.name == _ORDERED and not args
        self.stack.append(Pairs() if empty else Inert(callee.name, args))

    def build(self) -> None:
        """Gives an `Inert` its state, once."""
        state, target = self.pop(), self.stack[-1]
        if not isinstance(target, Inert) or target.state is not None:
            raise ValueError("a state for something that has none")
        target.state = state

    def extend(self, values: list[Any]) -> None:
        """Appends to a list."""
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("only lists grow")
        target.extend(values)

    def fill(self, values: list[Any]) -> None:
        """Adds keys and values, in turn, to a dictionary."""
        target = self.stack[-1]
        if type(target) is not Pairs or len(values) % 2:
            raise ValueError("no dictionary, or a key without a value")
        target.extend(zip(values[::2], values[1::2], strict=True))

    def set_one(self) -> None:
        """Adds one key and its value to a dictionary."""
        value, key = self.pop(), self.pop()
        self.fill([key, value])


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: lambda m: m.skip(1),
    pickle.FRAME: lambda m: m.skip(8),
    pickle.MARK: _push(_MARK),
    pickle.NONE: _push(None),
    pickle.NEWTRUE: _push(True),
    pickle.NEWFALSE: _push(False),
    pickle.EMPTY_LIST: lambda m: m.stack.append([]),
    pickle.EMPTY_DICT: lambda m: m.stack.append(Pairs()),
    pickle.EMPTY_TUPLE: _push(()),
    pickle.TUPLE: lambda m: m.stack.append(tuple(m.above_mark())),
    pickle.TUPLE1: lambda m: m.push_tuple(1),
    pickle.TUPLE2: lambda m: m.push_tuple(2),
    pickle.TUPLE3: lambda m: m.push_tuple(3),
    pickle.BININT: lambda m: m.whole_number(4),
    pickle.BININT1: lambda m: m.stack.append(m.take(1)[0]),
    pickle.BININT2: lambda m: m.stack.append(m.number("<H", 2)),
    pickle.LONG1: lambda m: m.whole_number(m.take(1)[0]),
    pickle.BINFLOAT: lambda m: m.stack.append(m.number(">d", 8)),
    pickle.SHORT_BINUNICODE: lambda m: m.text(m.take(1)[0]),
    pickle.BINUNICODE: lambda m: m.text(m.number("<I", 4)),
    pickle.GLOBAL: lambda m: m.ask(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.ask_stacked(),
    pickle.REDUCE: lambda m: m.call(),
    pickle.NEWOBJ: lambda m: m.call(),
    pickle.BUILD: lambda m: m.build(),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.above_mark()),
    pickle.SETITEM: lambda m: m.set_one(),
    pickle.SETITEMS: lambda m: m.fill(m.above_mark()),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.BINPUT: lambda m: m.put(m.take(1)[0]),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("<I", 4)),
    pickle.BINGET: lambda m: m.stack.append(m.memo[m.take(1)[0]]),
    pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.number("<I", 4)]),
    # what torch.save puts where a storage is: a tuple that says which
    pickle.BINPERSID: lambda m: m.stack.append(Inert("storage", (m.pop(),))),
}
_TABLE = {code[0]: step for code, step in _STEPS.items()}
