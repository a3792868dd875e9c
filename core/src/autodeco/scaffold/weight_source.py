"""The source of a new plugin's weight map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from autodeco import blocks
from autodeco.scaffold.literals import WIDTH, Call, Comment, Lines, Raw, source
from autodeco.scaffold.matching import LAYERS, Left, Proposal
from autodeco.scaffold.reading import Source
from autodeco.scaffold.sizes import expressions
from autodeco.weights import Dims, Rule

TODO = "TODO(author)"
_CONSTANTS = (
    *("HF_ATTENTION", "HF_MLP", "HF_LAYER"),
    *("MEGATRON_EXPERT", "MEGATRON_ATTENTION", "MEGATRON_MLP", "MEGATRON_LAYER"),
)


class _Writer:
    """Collects the items of the map, and what has to be imported for them."""

    def __init__(self, given: Source) -> None:
        self.given = given
        self.sizes = expressions(given.small)
        self.blocks: set[str] = set()
        self.weights: set[str] = {"WeightMap"}

    def name(self, text: str) -> Raw:
        """A tensor's name, on a constant of `autodeco.blocks` where it begins with one."""
        for constant in _CONSTANTS:
            value: str = getattr(blocks, constant)
            if text.startswith(value) and text != value:
                self.blocks.add(constant)
                return Raw(f'{constant} + "{text.removeprefix(value)}"')
        return Raw(f'"{text}"')

    def size(self, size: Dims) -> Raw:
        """A function that makes this size of a shape."""
        if size == (self.given.small.hidden_size,):
            self.blocks.add("width")
            return Raw("width")
        texts = [self.sizes.get(n, str(n)) for n in size]
        return Raw(f"lambda s: ({', '.join(texts)}{',' if len(texts) == 1 else ''})")

    def rule(self, rule: Rule) -> Call:
        """The call that makes a rule."""
        self.weights.add(rule.kind)
        kwargs: dict[str, Any] = {}
        sizes = rule.sizes(self.given.small)
        if rule.kind == "gate_up":
            rows, *columns = sizes[0]
            kwargs["size"] = self.size((rows // 2 if rule.interleaved else rows, *columns))
        names = tuple(self.name(name) for name in (*rule.sources, rule.target))
        args: tuple[Any, ...] = names
        if rule.kind == "copy":
            args = (*names, self.size(sizes[0]))
            if rule.parallel_dim is not None:
                kwargs["parallel_dim"] = rule.parallel_dim
        elif rule.kind == "qkv" and len(sizes[0]) == 1:
            kwargs["bias"] = True
        if rule.layers is not None:
            kwargs |= self.layers(rule)
        flags = ("stacked", "transposed", "interleaved")
        kwargs |= {flag: True for flag in flags if getattr(rule, flag)}
        return Call(rule.kind, args, kwargs)

    def layers(self, rule: Rule) -> dict[str, Raw]:
        """The argument that says which layers have it."""
        small = self.given.small
        found = rule.layers(small) if rule.layers is not None else range(small.num_layers)
        if found == range(small.num_layers):
            return {}
        name = "sparse_layers" if found == small.sparse_layers else "dense_layers"
        self.blocks.add(name)
        return {"layers": Raw(name)}

    def left(self, left: Left) -> Iterator[Any]:
        """The items of a tensor that no rule is known for."""
        if left.layers == "some":
            yield Comment(f"{left.name} {list(left.shape)}: not in all layers, so not read here")
            return
        for number in sorted({n for n in left.shape if n not in self.sizes}):
            yield Comment(f"{TODO}: {number} is this size in the debug preset alone")
        self.weights.add("copy")
        kwargs = {}
        if left.layers != "all":
            self.blocks.add(f"{left.layers}_layers")
            kwargs["layers"] = Raw(f"{left.layers}_layers")
        assert left.layers in LAYERS
        target = Raw(f'"{TODO} {left.name}"')
        yield Call("copy", (self.name(left.name), target, self.size(left.shape)), kwargs)


def weights_source(title: str, proposal: Proposal, given: Source) -> str:
    """Returns ``weights.py``.

    Args:
        title: The family's name for people.
        proposal: The weight map, as far as it is known.
        given: The model.
    """
    writer = _Writer(given)
    items = list(_items(proposal, writer))
    kwargs: dict[str, Any] = {"rules": Lines(tuple(items))}
    if proposal.renames:
        writer.blocks.add("renamed")
        kwargs["rules"] = Call("renamed", (Lines(tuple(items)), dict(proposal.renames)))
    drops = list(_drops(given))
    if drops:
        kwargs["drops"] = Lines(tuple(drops))
        writer.weights.add("Drop")
    body = source(Call("WeightMap", (), kwargs), head="WEIGHT_MAP = ")
    imports = [*_import("autodeco.blocks", writer.blocks)]
    imports += _import("autodeco.weights", writer.weights)
    doc = f'"""{title}\'s weight map: Hugging Face names to megatron-core names."""'
    return "\n".join([doc, "", *imports, "", *body]) + "\n"


def _items(proposal: Proposal, writer: _Writer) -> Iterator[Any]:
    for block in proposal.blocks:
        writer.blocks.add(block.name)
        yield Call(f"*{block.name}", (), block.kwargs)
    origin = ""
    for rule, where in proposal.rules:
        if where and where != origin:
            yield Comment(where)
            origin = where
        yield writer.rule(rule)
    if proposal.left:
        yield Comment(f"{TODO}: megatron-core's names of these (docs/plugins.md), or drop them;")
        yield Comment("until then the hf engine alone can run the model")
    for left in proposal.left:
        yield from writer.left(left)


def _drops(given: Source) -> Iterator[Any]:
    if not given.extra:
        return
    yield Comment(f"{TODO}: the checkpoint has these beside the model's own; say why nothing is")
    yield Comment("lost without them, or map them")
    for name in given.extra:
        layer = "{layer}" if name.endswith(".*") else r"\d+"
        pattern = name.removesuffix(".*").replace(".", r"\.").replace("{expert}", r"\d+")
        pattern = pattern.replace("{layer}", layer) + (r"\..*" if name.endswith(".*") else "")
        yield Call("Drop", (pattern, f"{TODO}: why"))


def _import(module: str, names: Iterable[str]) -> list[str]:
    def kind(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)

    ordered = sorted(names, key=kind)
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"from {module} import (", *(f"    {name}," for name in ordered), ")"]
