"""Proposes a weight map for tensors, by their names: blocks, rules of other plugins, the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autodeco import blocks
from autodeco.errors import WeightsError
from autodeco.family import FamilySpec, ModelShape
from autodeco.scaffold.naming import Block, Names, template
from autodeco.scaffold.reading import Source
from autodeco.scaffold.singles import KNOWN
from autodeco.weights import Dims, Rule, WeightMap, copy, source_sizes


@dataclass(frozen=True)
class Left:
    """A tensor that no rule is known for.

    Attributes:
        name: With counters.
        shape: In the small model.
        layers: "all", "dense", "sparse", or "some": no rule can say which.
    """

    name: str
    shape: Dims
    layers: str


@dataclass(frozen=True)
class Proposal:
    """A weight map, as far as it is known.

    Attributes:
        renames: What blocks call otherwise -> what the model calls it.
        blocks: In order.
        rules: Single ones, each with where it is from.
        left: What nothing is known for.
        megatron: Fields that the single rules bring along.
        resembles: The plugin whose map covers most of the names, and how many.
        total: Names of the small model's checkpoint.
    """

    renames: Mapping[str, str]
    blocks: tuple[Block, ...]
    rules: tuple[tuple[Rule, str], ...]
    left: tuple[Left, ...]
    megatron: Mapping[str, Any] = field(default_factory=dict)
    resembles: tuple[str, int] = ("", 0)
    total: int = 0

    def block(self, name: str) -> Mapping[str, Any] | None:
        """Returns the arguments of a block, or None: it does not occur."""
        return next((b.kwargs for b in self.blocks if b.name == name), None)


class Cover:
    """The tensors that rules have not read yet.

    Args:
        tensors: Name -> shape.
        shape: The sizes that they belong to.
    """

    def __init__(self, tensors: Mapping[str, Dims], shape: ModelShape) -> None:
        self.left = dict(tensors)
        self.shape = shape
        self.targets: set[str] = set()

    def take(self, rules: Sequence[Rule]) -> bool:
        """Takes what the rules read, if all of it is there in the right shape."""
        try:
            bound = WeightMap(tuple(rules)).expand(self.shape)
            sizes = source_sizes(bound)
        except (WeightsError, IndexError):
            return False
        targets = {name for b in bound for name in (b.target, *b.copies)}
        if not sizes or targets & self.targets:
            return False
        if any(self.left.get(name) != size for name, size in sizes.items()):
            return False
        for name in sizes:
            del self.left[name]
        for twin in (name for b in bound for name in b.rule.twins):
            self.left.pop(twin, None)
        self.targets |= targets
        return True


def propose(source: Source, families: Sequence[FamilySpec]) -> Proposal:
    """Returns the weight map that fits a model's tensors best.

    Args:
        source: The model.
        families: Of the installed plugins.
    """
    cover = Cover(source.tensors, source.small)
    names = Names(source.tensors, source.small)
    renames = names.renames()
    taken = []
    for block in names.blocks():
        if cover.take(blocks.renamed(block.rules(), renames)):
            taken.append(block)
    taken.sort(key=lambda block: block.name == "output_layer")
    found: list[tuple[Rule, str]] = []
    megatron: dict[str, Any] = {}
    maps = {family.id: family.weight_map.rules for family in families}
    for origin, rules in {"": _rules_of_blocks(), **maps}.items():
        for rule in blocks.renamed(rules, renames):
            if rule.kind != "tied" and rule.when(source.small) and cover.take((rule,)):
                found.append((rule, f"as in {origin}" if origin else ""))
                megatron |= _fields(rule, source)
    nearest = _nearest(source, maps)
    for left in _templates(cover.left, source.small):
        single = _single(left, cover)
        if single is not None:
            found.append((single, ""))
            megatron |= _fields(single, source)
    return Proposal(
        renames,
        tuple(taken),
        tuple(found),
        tuple(_templates(cover.left, source.small)),
        {**_like(nearest, source, families), **megatron},
        nearest,
        len(source.tensors),
    )


def _rules_of_blocks() -> tuple[Rule, ...]:
    """The rules of blocks that did not fit as a whole."""
    return (*blocks.latent_attention(), *blocks.experts(), *blocks.gated_mlp())


def _nearest(source: Source, maps: Mapping[str, Sequence[Rule]]) -> tuple[str, int]:
    """The plugin whose map has most of the names, and how many it has."""
    best = ("", 0)
    for name, rules in maps.items():
        cover = Cover(source.tensors, source.small)
        for rule in rules:
            if rule.when(source.small):
                cover.take((rule,))
        count = len(source.tensors) - len(cover.left)
        if count > best[1]:
            best = (name, count)
    return best


def _templates(left: Mapping[str, Dims], shape: ModelShape) -> Iterator[Left]:
    found: dict[str, list[tuple[str, Dims]]] = {}
    for name, size in left.items():
        found.setdefault(template(name), []).append((name, size))
    for name, items in sorted(found.items()):
        sizes = {size for _, size in items}
        layers = "some"
        if "{layer}" not in name:
            layers = "all"
        elif len(sizes) == 1:
            numbers = {int(re.findall(r"\.(\d+)\.", item)[0]) for item, _ in items}
            kinds = {
                "all": range(shape.num_layers),
                "sparse": shape.sparse_layers,
                "dense": range(shape.sparse_layers.start),
            }
            layers = next((k for k, v in kinds.items() if numbers == set(v)), "some")
        yield Left(name, items[0][1], layers)


def _single(left: Left, cover: Cover) -> Rule | None:
    """A rule for one tensor that no block has, if its place is known."""
    if left.layers == "some":
        return None
    for pattern, target, parallel_dim, _ in KNOWN:
        flat = len(left.shape) == 1
        if not re.fullmatch(pattern, left.name) or (target.endswith("bias") and not flat):
            continue
        rule = copy(
            left.name,
            target,
            lambda _: left.shape,
            parallel_dim=parallel_dim,
            layers=LAYERS[left.layers],
        )
        if cover.take((rule,)):
            return rule
    return None


def _fields(rule: Rule, source: Source) -> dict[str, Any]:
    """Fields of TransformerConfig that go with a tensor, as far as the configuration has them."""
    found: dict[str, Any] = {}
    for pattern, target, _, fields in KNOWN:
        if target == rule.target and re.fullmatch(pattern, rule.sources[0]):
            found |= {k: v for k, v in fields.items() if _known(v, source)}
    return found


def _like(
    nearest: tuple[str, int], source: Source, families: Sequence[FamilySpec]
) -> dict[str, Any]:
    """Fields of TransformerConfig of the plugin that has all of the names."""
    if nearest[1] < len(source.tensors):
        return {}
    (family,) = (family for family in families if family.id == nearest[0])
    named = [a for a in family.architectures if a.name == source.name]
    fields = (named or list(family.architectures))[0].megatron
    return {name: value for name, value in fields.items() if _known(value, source)}


def _known(value: Any, source: Source) -> bool:
    key = getattr(value, "key", None)
    return key is None or source.config.get(key) is not None


LAYERS = {"all": None, "dense": blocks.dense_layers, "sparse": blocks.sparse_layers}
