"""Weight maps: how the tensors of a checkpoint become those of the engine, and back.

A map is a list of rules, each naming source tensors (Hugging Face) and one kind of target
(megatron-core), with ``{layer}`` and ``{expert}`` as counters. Rules are data; the code that packs
and unpacks tensors by them stands once, in `autodeco.convert.operations`. `autodeco.blocks` has the
rules of the usual blocks of a decoder.
A map is total: `WeightMap.bind` raises unless every source tensor is used exactly once, each of its
elements, or dropped with a reason, and every target is filled exactly once.
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
SizeOf = Callable[["ModelShape"], Dims]


@dataclass(frozen=True)
class Rule:
    """One line of a weight map; build it with `copy`, `qkv`, `gate_up` or `tied`.

    Attributes:
        kind: How parts are packed into the target.
        sources: Names in the checkpoint, with counters.
        target: The name in megatron-core, with counters.
        sizes: The shape of each part, as the target has it.
        when: Whether the rule applies to a model of this shape.
        parallel_dim: Dimension of the target that tensor parallelism splits; None: replicated.
        copies: Further places that hold the same tensor (a tied output layer on the last stage).
        twins: Names under which a checkpoint may store the source a second time; they must be
            equal to it, byte for byte, and are then left out.
        layers: The layers that have it; None: all.
        stacked: The source holds all experts in its first dimension.
        transposed: The source has inputs before outputs.
        interleaved: The source's rows are a gate's and an up projection's in turn.
    """

    kind: Kind
    sources: tuple[str, ...]
    target: str
    sizes: Callable[[ModelShape], tuple[Dims, ...]]
    when: Callable[[ModelShape], bool] = lambda shape: True
    parallel_dim: int | None = None
    copies: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    layers: Callable[[ModelShape], range] | None = None
    stacked: bool = False
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Drop:
    """Source tensors that are left out on purpose.

    Attributes:
        pattern: A regular expression that matches whole names; ``{layer}`` in it stands for the
            number of the layer behind the last one.
        reason: Why nothing is lost; printed when the rule acts.
    """

    pattern: str
    reason: str

    def matches(self, name: str, shape: ModelShape) -> bool:
        """Whether it drops this tensor."""
        pattern = self.pattern.replace("{layer}", str(shape.num_layers))
        return re.fullmatch(pattern, name) is not None


def _always(shape: ModelShape) -> bool:
    return True


def copy(
    source: str,
    target: str,
    size: SizeOf,
    *,
    parallel_dim: int | None = None,
    when: Callable[[ModelShape], bool] = _always,
    layers: Callable[[ModelShape], range] | None = None,
    stacked: bool = False,
    transposed: bool = False,
) -> Rule:
    """The target is the source tensor, or one expert of it, perhaps transposed."""
    return Rule(
        *("copy", (source,), target, lambda s: (size(s),), when, parallel_dim),
        layers=layers,
        stacked=stacked,
        transposed=transposed,
    )


def qkv(*names: str, bias: bool = False, when: Callable[[ModelShape], bool] = _always) -> Rule:
    """Query, key and value are stacked group by group: a group's queries, its key, its value.

    Args:
        *names: The query's, the key's and the value's, or one tensor that has them in this order;
            then the target.
        bias: They are biases.
        when: Whether the rule applies.
    """
    *sources, target = names

    def sizes(s: ModelShape) -> tuple[Dims, ...]:
        columns: Dims = () if bias else (s.hidden_size,)
        rows = (s.num_heads, s.num_kv_heads, s.num_kv_heads)
        return tuple((n * s.head_dim, *columns) for n in rows)

    return Rule("qkv", tuple(sources), target, sizes, when, 0)


def gate_up(
    *names: str,
    size: SizeOf,
    when: Callable[[ModelShape], bool] = _always,
    layers: Callable[[ModelShape], range] | None = None,
    stacked: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
) -> Rule:
    """Gate and up projections are stacked, gate first; tensor ranks get a slice of each.

    Args:
        *names: The gate's and the up projection's, or one tensor that has both; then the target.
        size: Of each of the two, outputs first.
        when: Whether the rule applies.
        layers: The layers that have it.
        stacked: The source holds all experts in its first dimension.
        transposed: The source has inputs before outputs.
        interleaved: The one source has the rows of gate and up in turn.
    """
    *sources, target = names

    def sizes(s: ModelShape) -> tuple[Dims, ...]:
        rows, *columns = size(s)
        return ((2 * rows, *columns),) if interleaved else (size(s), size(s))

    return Rule(
        *("gate_up", tuple(sources), target, sizes, when, 0),
        layers=layers,
        stacked=stacked,
        transposed=transposed,
        interleaved=interleaved,
    )


def tied(
    source: str,
    target: str,
    copies: tuple[str, ...],
    size: SizeOf,
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
class SourcePart:
    """A block of rows of a source tensor, as the target sees it.

    Attributes:
        source: The source's name.
        size: Of the block, without the dimension of the experts and with outputs first.
        start: Its first row.
        expert: Its place in the source's first dimension; None: the source has no such dimension.
        transposed: The source has inputs before outputs.
    """

    source: str
    size: Dims
    start: int = 0
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class BoundRule:
    """A rule with its counters filled in.

    Attributes:
        rule: The rule.
        parts: What the target is packed from.
        target: The target's name.
        copies: Names of its declared copies.
    """

    rule: Rule
    parts: tuple[SourcePart, ...]
    target: str
    copies: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Returns the names of the source tensors, each once."""
        return tuple(dict.fromkeys(part.source for part in self.parts))

    @property
    def of_expert(self) -> bool:
        """Whether the target belongs to one expert, and is split as experts are."""
        return "{expert}" in self.rule.target


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
        """Returns every source name that the map reads -> its shape in the checkpoint."""
        return source_sizes(self.rules)

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
            WeightsError: Two rules read one element of a source or fill one target, or a part of a
                source is read by none.
        """
        bound = tuple(b for rule in self.rules if rule.when(shape) for b in _bind(rule, shape))
        source_sizes(bound)
        seen: set[str] = set()
        for name in (n for b in bound for n in (b.target, *b.copies)):
            if name in seen:
                raise _bad_map(f"target is filled twice: {name!r}", "remove one of the two rules")
            seen.add(name)
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
        if shape.num_layers > len(available):  # said before they are all counted out
            raise WeightsError(
                f"{shape.num_layers:,} layers cannot be made of {len(available):,} tensors",
                who=who,
                where=where,
                fix="the checkpoint is incomplete, or its config.json of another: fetch it again",
            )
        rules = self.expand(shape)
        wanted = {name for rule in rules for name in rule.sources}
        dropped = {
            n: d.reason for n in available - wanted for d in self.drops if d.matches(n, shape)
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


def source_sizes(rules: Iterable[BoundRule]) -> dict[str, Dims]:
    """Returns every source name -> its shape in the checkpoint, made up of the parts of all rules.

    Raises:
        WeightsError: Two parts cover one element, or there is a hole between them.
    """
    found: dict[str, list[SourcePart]] = {}
    for rule in rules:
        for part in rule.parts:
            found.setdefault(part.source, []).append(part)
    return {name: _size_of(name, parts) for name, parts in found.items()}


def _size_of(name: str, parts: list[SourcePart]) -> Dims:
    ends: dict[int | None, int] = {}
    for part in sorted(parts, key=lambda p: (-1 if p.expert is None else p.expert, p.start)):
        end = ends.get(part.expert, 0)
        if part.start < end:
            raise _bad_map(f"source tensor is read twice: {name!r}", "remove one of the two rules")
        if part.start > end:
            raise _bad_map(
                f"rows {end} to {part.start} of {name!r} are read by no rule", "add a rule for them"
            )
        ends[part.expert] = part.start + part.size[0]
    rows, columns = set(ends.values()), {part.size[1:] for part in parts}
    experts = tuple(ends)
    whole = experts == (None,) or experts == tuple(range(len(experts)))
    if len(rows) > 1 or len(columns) > 1 or not whole:
        raise _bad_map(
            f"the parts of {name!r} do not make up a tensor", "check the sizes of its rules"
        )
    size = (rows.pop(), *columns.pop())
    if parts[0].transposed:
        size = size[::-1]
    return size if experts == (None,) else (len(experts), *size)


def _bad_map(what: str, fix: str) -> WeightsError:
    return WeightsError(f"weight map: {what}", fix=fix)


def _bind(rule: Rule, shape: ModelShape) -> Iterator[BoundRule]:
    text = rule.target + "".join(rule.sources)
    every = range(shape.num_layers) if rule.layers is None else rule.layers(shape)
    layers = every if "{layer}" in text else (None,)
    experts = range(shape.num_experts) if "{expert}" in text else (None,)
    sizes = rule.sizes(shape)
    for layer in layers:
        for expert in experts:

            def fill(name: str, layer: int | None = layer, expert: int | None = expert) -> str:
                return name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

            index = expert if rule.stacked else None
            yield BoundRule(
                rule,
                tuple(_parts([fill(name) for name in rule.sources], sizes, index, rule.transposed)),
                fill(rule.target),
                tuple(fill(name) for name in rule.copies),
            )


def _parts(
    names: list[str], sizes: tuple[Dims, ...], expert: int | None, transposed: bool
) -> Iterator[SourcePart]:
    """One part a source, or all parts one after the other in one source."""
    if len(names) not in (1, len(sizes)):
        raise _bad_map(f"{len(names)} sources for {len(sizes)} parts: {names[0]!r}", "name each")
    start = 0
    for number, size in enumerate(sizes):
        name = names[0] if len(names) == 1 else names[number]
        yield SourcePart(name, size, start if len(names) == 1 else 0, expert, transposed)
        start += size[0]
