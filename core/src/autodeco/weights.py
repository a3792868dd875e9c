"""Weight maps: how the tensors of a checkpoint become those of the engine, and back.

A map is a list of rules, each naming source tensors (Hugging Face) and one kind of target
(megatron-core), with ``{layer}`` and ``{expert}`` as counters. Rules are data; the code that packs
and unpacks tensors by them stands once, in `autodeco.convert.operations`.
A map is total: `WeightMap.bind` raises unless every source tensor is used exactly once or dropped
with a reason, and every target is filled exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from autodeco.errors import WeightsError

if TYPE_CHECKING:
    from autodeco.family import ModelShape

Dims = tuple[int, ...]
Kind = Literal["copy", "qkv", "gate_up", "tied"]


@dataclass(frozen=True)
class Rule:
    """One line of a weight map; build it with `copy`, `qkv`, `gate_up` or `tied`.

    Attributes:
        kind: How sources are packed into the target.
        sources: Names in the checkpoint, with counters.
        target: The name in megatron-core, with counters.
        sizes: The shape of each source, from the model's shape.
        when: Whether the rule applies to a model of this shape.
        parallel_dim: Dimension of the target that tensor parallelism splits; None: replicated.
        copies: Further places that hold the same tensor (a tied output layer on the last stage).
        twins: Names under which a checkpoint may store the source a second time; they must be
            equal to it, byte for byte, and are then left out.
    """

    kind: Kind
    sources: tuple[str, ...]
    target: str
    sizes: Callable[[ModelShape], tuple[Dims, ...]]
    when: Callable[[ModelShape], bool] = lambda shape: True
    parallel_dim: int | None = None
    copies: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drop:
    """Source tensors that are left out on purpose.

    Attributes:
        pattern: A regular expression that matches whole names.
        reason: Why nothing is lost; printed when the rule acts.
    """

    pattern: str
    reason: str


def _always(shape: ModelShape) -> bool:
    return True


def copy(
    source: str,
    target: str,
    size: Callable[[ModelShape], Dims],
    *,
    parallel_dim: int | None = None,
    when: Callable[[ModelShape], bool] = _always,
) -> Rule:
    """The target is the source tensor, unchanged."""
    return Rule("copy", (source,), target, lambda s: (size(s),), when, parallel_dim)


def qkv(
    query: str,
    key: str,
    value: str,
    target: str,
    *,
    bias: bool = False,
    when: Callable[[ModelShape], bool] = _always,
) -> Rule:
    """Query, key and value are stacked group by group: a group's queries, its key, its value."""

    def sizes(s: ModelShape) -> tuple[Dims, ...]:
        columns: Dims = () if bias else (s.hidden_size,)
        rows = (s.num_heads, s.num_kv_heads, s.num_kv_heads)
        return tuple((n * s.head_dim, *columns) for n in rows)

    return Rule("qkv", (query, key, value), target, sizes, when, 0)


def gate_up(
    gate: str,
    up: str,
    target: str,
    size: Callable[[ModelShape], Dims],
    *,
    when: Callable[[ModelShape], bool] = _always,
) -> Rule:
    """Gate and up projections are stacked, gate first; tensor ranks get a slice of each."""
    return Rule("gate_up", (gate, up), target, lambda s: (size(s), size(s)), when, 0)


def tied(
    source: str,
    target: str,
    copies: tuple[str, ...],
    size: Callable[[ModelShape], Dims],
    *,
    parallel_dim: int | None = 0,
    when: Callable[[ModelShape], bool] = _always,
    twins: tuple[str, ...] = (),
) -> Rule:
    """One source fills the target and its declared copies (tied embeddings).

    A checkpoint may store the source a second time under the names `twins`, as many small models
    with tied embeddings do on the hub.
    """
    return Rule("tied", (source,), target, lambda s: (size(s),), when, parallel_dim, copies, twins)


@dataclass(frozen=True)
class BoundRule:
    """A rule with its counters filled in.

    Attributes:
        rule: The rule.
        sources: Names of the source tensors.
        source_sizes: Their shapes.
        target: The target's name.
        copies: Names of its declared copies.
    """

    rule: Rule
    sources: tuple[str, ...]
    source_sizes: tuple[Dims, ...]
    target: str
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class BoundWeightMap:
    """A weight map for one model: every rule, every layer, every expert.

    Attributes:
        shape: The model's shape.
        rules: In the order of the layers.
        dropped: Dropped source name -> reason.
        twins: Those of them that must equal a tensor that is mapped -> its name.
    """

    shape: ModelShape
    rules: tuple[BoundRule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)

    def source_sizes(self) -> dict[str, Dims]:
        """Returns every source name that the map reads -> its shape."""
        return {
            name: size
            for rule in self.rules
            for name, size in zip(rule.sources, rule.source_sizes, strict=True)
        }

    def targets(self) -> tuple[str, ...]:
        """Returns every target name, declared copies included."""
        return tuple(name for rule in self.rules for name in (rule.target, *rule.copies))


@dataclass(frozen=True)
class WeightMap:
    """A family's table from Hugging Face names to Megatron names.

    Attributes:
        rules: Each names sources and a target.
        drops: Source tensors that are left out on purpose.
    """

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()

    def expand(self, shape: ModelShape) -> tuple[BoundRule, ...]:
        """Fills in the counters for a model of this shape.

        Raises:
            WeightsError: Two rules read one source or fill one target.
        """
        bound = tuple(b for rule in self.rules if rule.when(shape) for b in _bind(rule, shape))
        _refuse_doubles((n for b in bound for n in b.sources), "source tensor is read twice")
        _refuse_doubles((n for b in bound for n in (b.target, *b.copies)), "target is filled twice")
        return bound

    def bind(
        self, shape: ModelShape, names: Iterable[str], *, who: str | None = None, where: str = ""
    ) -> BoundWeightMap:
        """Binds the map to the tensors of a checkpoint and proves that it is total.

        Args:
            shape: The model's shape.
            names: All tensor names of the checkpoint.
            who: The plugin, for errors.
            where: The checkpoint, for errors.

        Raises:
            WeightsError: A tensor is neither used nor dropped, or one is missing.
        """
        available = set(names)
        rules = self.expand(shape)
        wanted = {name for rule in rules for name in rule.sources}
        dropped = {
            n: d.reason
            for n in available - wanted
            for d in self.drops
            if re.fullmatch(d.pattern, n)
        }
        twins = {n: b.sources[0] for b in rules for n in b.rule.twins if n in available}
        dropped |= {n: f"stored twice: the same tensor as {of}" for n, of in twins.items()}
        missing = sorted(wanted - available)
        unknown = sorted(available - wanted - set(dropped))
        if missing:
            raise WeightsError(
                f"{len(missing)} tensors are missing, the first is {missing[0]!r}",
                who=who,
                where=where,
                fix="the checkpoint is incomplete or of another shape: fetch it again, or check "
                "--plugin and --preset",
            )
        if unknown:
            raise WeightsError(
                f"{len(unknown)} tensors are neither mapped nor dropped, "
                f"the first is {unknown[0]!r}",
                who=who,
                where=where,
                fix="the plugin's weight map does not know them: map them, or drop them with a "
                "reason",
            )
        return BoundWeightMap(shape, rules, dropped, twins)


def _bind(rule: Rule, shape: ModelShape) -> Iterator[BoundRule]:
    text = rule.target + "".join(rule.sources)
    layers = range(shape.num_layers) if "{layer}" in text else (None,)
    experts = range(shape.num_experts) if "{expert}" in text else (None,)
    sizes = rule.sizes(shape)
    for layer in layers:
        for expert in experts:

            def fill(name: str, layer: int | None = layer, expert: int | None = expert) -> str:
                return name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

            yield BoundRule(
                rule,
                tuple(fill(name) for name in rule.sources),
                sizes,
                fill(rule.target),
                tuple(fill(name) for name in rule.copies),
            )


def _refuse_doubles(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise WeightsError(f"weight map: {what}: {name!r}", fix="remove one of the two rules")
        seen.add(name)
