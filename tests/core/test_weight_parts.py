"""The parts of weight maps: rows, experts, fused, in turn, transposed; and that they cover."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autodeco.convert.operations import Region, pack, read_target, sources_from_targets
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.shards import ShardReader
from autodeco.convert.source import open_source
from autodeco.errors import WeightsError
from autodeco.family import FamilySpec, ModelShape
from autodeco.job import Job
from autodeco.weights import (
    BoundRule,
    BoundWeightMap,
    Drop,
    Rule,
    SourcePart,
    WeightMap,
    copy,
    gate_up,
    qkv,
    source_sizes,
    tied,
)

FAMILIES = ("qwen3", "qwen25", "llama31", "gpt_oss", "deepseek_v3")
# layers, width, heads, key-value heads, their width, inner width, vocabulary, tied; experts
SHAPE = ModelShape(4, 12, 8, 4, 3, 20, 50, False, 4, 2, 8, dense_layers=1)
INNER = 8


class Tensors:
    """Tensors in memory, read like a checkpoint; counts what is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.elements = 0

    def read(self, name: str, region: Region | None = None) -> Tensor:
        tensor = self.tensors[name]
        if region is not None:
            assert len(region) == tensor.ndim
            tensor = tensor[tuple(slice(a, b) for a, b in region)]
        self.elements += tensor.numel()
        return tensor


def numbered(rules: Iterable[BoundRule], shape: ModelShape = SHAPE) -> Tensors:
    """Every source of the rules, each element another number."""
    found, first = {}, 0
    for name, size in source_sizes(rules).items():
        count = int(torch.tensor(size).prod())
        found[name] = torch.arange(first, first + count, dtype=torch.float64).view(size)
        first += count
    return Tensors(found)


def size(s: ModelShape) -> tuple[int, ...]:
    return (INNER, s.hidden_size)


def down(s: ModelShape) -> tuple[int, ...]:
    return (s.hidden_size, INNER)


def sparse(s: ModelShape) -> range:
    return s.sparse_layers


E = "m.{layer}.experts.{expert}."
SEPARATE = gate_up("l.{layer}.gate", "l.{layer}.up", "m.{layer}.fc1", size=size)
RULES: dict[str, Rule] = {
    "copied": copy("l.{layer}.down", "m.{layer}.fc2", down, parallel_dim=1),
    "rows": copy("a", "b", size, parallel_dim=0),
    "vector": copy("a", "b", lambda s: (s.num_heads,), parallel_dim=0),
    "replicated": copy("a", "b", size),
    "tied": tied("a", "b", ("c",), size),
    "transposed": copy("a", "b", size, parallel_dim=0, transposed=True),
    "transposed columns": copy("a", "b", down, parallel_dim=1, transposed=True),
    "qkv": qkv("l.{layer}.q", "l.{layer}.k", "l.{layer}.v", "m.{layer}.qkv"),
    "qkv biases": qkv("q", "k", "v", "qkv", bias=True),
    "fused qkv": qkv("l.{layer}.qkv", "m.{layer}.qkv"),
    "fused qkv biases": qkv("l.{layer}.qkv", "m.{layer}.qkv", bias=True),
    "gate and up": SEPARATE,
    "fused gate and up": gate_up("l.{layer}.both", "m.{layer}.fc1", size=size),
    "in turn": gate_up("l.{layer}.both", "m.{layer}.fc1", size=size, interleaved=True),
    "biases in turn": gate_up("b", "t", size=lambda s: (INNER,), interleaved=True),
    "of experts": gate_up("l.{layer}.{expert}.g", "l.{layer}.{expert}.u", E + "fc1", size=size),
    "stacked": copy("l.{layer}.down", E + "fc2", down, parallel_dim=1, stacked=True, layers=sparse),
    "stacked, transposed": copy(
        "l.{layer}.down", E + "fc2", down, parallel_dim=1, stacked=True, transposed=True
    ),
    "stacked, fused": gate_up("l.{layer}.both", E + "fc1", size=size, stacked=True),
    "stacked, fused, transposed": gate_up(
        "l.{layer}.both", E + "fc1", size=size, stacked=True, transposed=True
    ),
    "stacked, in turn, transposed": gate_up(
        "l.{layer}.both", E + "fc1", size=size, stacked=True, transposed=True, interleaved=True
    ),
    "stacked biases in turn": gate_up(
        "l.{layer}.b", E + "fc1", size=lambda s: (INNER,), stacked=True, interleaved=True
    ),
    "stacked, gate and up": gate_up(
        "l.{layer}.g", "l.{layer}.u", E + "fc1", size=size, stacked=True
    ),
}


def whole(rule: BoundRule, tensors: Mapping[str, Tensor], shape: ModelShape = SHAPE) -> Tensor:
    """The target, made as megatron-core's own documentation has it and not by `pack`."""
    kind, r = rule.rule.kind, rule.rule

    def source(name: str, expert: int | None) -> Tensor:
        tensor = tensors[name] if expert is None else tensors[name][expert]
        return tensor.T if r.transposed else tensor

    expert = rule.parts[0].expert
    found = [source(name, expert) for name in rule.sources]
    if kind == "qkv":
        heads, groups, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
        q, k, v = torch.cat(found).split([heads * d, groups * d, groups * d])
        each = heads // groups * d
        return torch.cat(
            [
                t[g * rows : (g + 1) * rows]
                for g in range(groups)
                for t, rows in ((q, each), (k, d), (v, d))
            ]
        )
    if r.interleaved:
        return torch.cat([found[0][0::2], found[0][1::2]])
    return torch.cat(found)


def rank_slice(rule: BoundRule, target: Tensor, rank: int, ranks: int) -> Tensor:
    """A tensor rank's part of a whole target, as megatron-core's layers split it."""
    dim = rule.rule.parallel_dim
    if dim is None:
        return target
    if rule.rule.kind == "gate_up":  # a slice of the gate, then the same of up
        return torch.cat([half.chunk(ranks)[rank] for half in target.chunk(2)])
    return target.chunk(ranks, dim)[rank]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_its_slice_of_the_target_and_no_more(name: str, ranks: int) -> None:
    bound = WeightMap((RULES[name],)).expand(SHAPE)
    source = numbered(bound)
    for rule in bound:
        target = whole(rule, source.tensors)
        for rank in range(ranks):
            source.elements = 0
            found = read_target(rule, SHAPE, source, rank, ranks)
            expected = rank_slice(rule, target, rank, ranks)
            assert torch.equal(found, expected), rule.target
            assert source.elements == expected.numel(), rule.target


@pytest.mark.parametrize("name", RULES)
def test_the_sources_come_back(name: str) -> None:
    bound = WeightMap((RULES[name],)).expand(SHAPE)
    source = numbered(bound)
    targets = {rule.target: whole(rule, source.tensors) for rule in bound}
    back = dict(sources_from_targets(BoundWeightMap(SHAPE, bound), targets.__getitem__))
    assert back.keys() == source.tensors.keys()
    assert all(torch.equal(back[n], tensor) for n, tensor in source.tensors.items())


def test_layers_and_experts_are_those_that_the_rule_names() -> None:
    bound = WeightMap((RULES["stacked"],)).expand(SHAPE)
    assert {rule.target for rule in bound} == {
        f"m.{layer}.experts.{expert}.fc2" for layer in (1, 2, 3) for expert in range(4)
    }
    assert source_sizes(bound) == {f"l.{n}.down": (4, 12, INNER) for n in (1, 2, 3)}
    assert all(rule.of_expert for rule in bound)
    none = dataclasses.replace(RULES["stacked"], layers=lambda s: range(0))
    assert WeightMap((none,)).expand(SHAPE) == ()


def test_sizes_in_the_checkpoint_are_made_up_of_parts() -> None:
    expected = {
        "fused qkv": (8 * 3 + 2 * 4 * 3, 12),
        "fused gate and up": (2 * INNER, 12),
        "in turn": (2 * INNER, 12),
        "stacked, fused": (4, 2 * INNER, 12),
        "stacked, fused, transposed": (4, 12, 2 * INNER),
        "stacked, in turn, transposed": (4, 12, 2 * INNER),
        "stacked biases in turn": (4, 2 * INNER),
        "stacked, transposed": (4, INNER, 12),
        "transposed": (12, INNER),
    }
    for name, wanted in expected.items():
        assert set(source_sizes(WeightMap((RULES[name],)).expand(SHAPE)).values()) == {wanted}, name


def half(target: str, start: int, rows: int) -> BoundRule:
    """A rule that reads some rows of the tensor "a"."""
    (bound,) = WeightMap((copy("a", target, lambda s: (rows, 12)),)).expand(SHAPE)
    (part,) = bound.parts
    return dataclasses.replace(bound, parts=(dataclasses.replace(part, start=start),))


def test_rows_that_no_rule_reads_are_an_error() -> None:
    assert source_sizes([half("x", 0, 4), half("y", 4, 4)]) == {"a": (8, 12)}
    with pytest.raises(WeightsError, match="rows 4 to 6 of 'a' are read by no rule"):
        source_sizes([half("x", 0, 4), half("y", 6, 2)])
    with pytest.raises(WeightsError, match="rows 0 to 2 of 'a' are read by no rule"):
        source_sizes([half("x", 2, 4)])


def test_rows_that_are_read_twice_are_an_error() -> None:
    with pytest.raises(WeightsError, match="source tensor is read twice: 'a'"):
        source_sizes([half("x", 0, 4), half("y", 3, 4)])
    twice = (copy("a", "x", size), copy("a", "y", size))
    with pytest.raises(WeightsError, match="source tensor is read twice: 'a'"):
        WeightMap(twice).expand(SHAPE)
    with pytest.raises(WeightsError, match=r"source tensor is read twice: 'l\.0\.gate'"):
        WeightMap((SEPARATE, copy("l.{layer}.gate", "n.{layer}", size))).expand(SHAPE)
    stacked = (RULES["stacked"], dataclasses.replace(RULES["stacked"], target=E + "other"))
    with pytest.raises(WeightsError, match=r"source tensor is read twice: 'l\.1\.down'"):
        WeightMap(stacked).expand(SHAPE)


def test_a_target_that_is_filled_twice_is_an_error() -> None:
    rules = (copy("a", "x", size), copy("b", "x", size))
    with pytest.raises(WeightsError, match="target is filled twice: 'x'"):
        WeightMap(rules).expand(SHAPE)
    with pytest.raises(WeightsError, match="target is filled twice: 'c'"):
        WeightMap((RULES["tied"], copy("d", "c", size))).expand(SHAPE)


def test_experts_that_are_missing_are_an_error() -> None:
    bound = WeightMap((RULES["stacked"],)).expand(SHAPE)
    first = [rule for rule in bound if rule.target.startswith("m.1.")]
    assert len(first) == 4
    for left in (first[:1] + first[2:], first[1:]):
        with pytest.raises(WeightsError, match=r"parts of 'l\.1\.down' do not make up a tensor"):
            source_sizes(left)
    fewer = [*first[:3], dataclasses.replace(first[3], parts=(_shorter(first[3]),))]
    with pytest.raises(WeightsError, match=r"parts of 'l\.1\.down' do not make up a tensor"):
        source_sizes(fewer)


def _shorter(rule: BoundRule) -> SourcePart:
    (part,) = rule.parts
    return dataclasses.replace(part, size=(part.size[0] - 1, *part.size[1:]))


def test_an_expert_of_a_checkpoint_that_is_missing_is_named() -> None:
    weight_map = WeightMap((RULES["of experts"],))
    names = {n for rule in weight_map.expand(SHAPE) for n in rule.sources}
    assert len(names) == 4 * 4 * 2
    with pytest.raises(WeightsError, match=r"1 tensors are missing, the first is 'l\.2\.3\.u'"):
        weight_map.bind(SHAPE, names - {"l.2.3.u"})
    with pytest.raises(
        WeightsError, match=r"neither mapped nor dropped, the first is 'l\.2\.4\.u'"
    ):
        weight_map.bind(SHAPE, names | {"l.2.4.u"})


def test_a_rule_with_too_few_sources_is_an_error() -> None:
    with pytest.raises(WeightsError, match="2 sources for 3 parts: 'q'"):
        WeightMap((qkv("q", "k", "qkv"),)).expand(SHAPE)
    with pytest.raises(WeightsError, match="2 sources for 1 parts: 'g'"):
        WeightMap((gate_up("g", "u", "t", size=size, interleaved=True),)).expand(SHAPE)


def test_columns_that_differ_in_one_tensor_are_an_error() -> None:
    narrow = dataclasses.replace(half("y", 4, 4).parts[0], size=(4, 11))
    with pytest.raises(WeightsError, match="parts of 'a' do not make up a tensor"):
        source_sizes([half("x", 0, 4), dataclasses.replace(half("y", 4, 4), parts=(narrow,))])


def test_layer_in_a_drop_is_the_one_behind_the_last() -> None:
    drop = Drop(r"l\.{layer}\..*", "a layer for something else")
    weight_map = WeightMap((RULES["copied"],), (drop,))
    names = [f"l.{layer}.down" for layer in range(4)]
    bound = weight_map.bind(SHAPE, [*names, "l.4.down", "l.4.norm"])
    assert bound.dropped == dict.fromkeys(("l.4.down", "l.4.norm"), "a layer for something else")
    for odd in ("l.5.down", "l.3.norm", "l.14.down", "l.44.norm", "model.l.4.x"):
        with pytest.raises(WeightsError, match="neither mapped nor dropped"):
            weight_map.bind(SHAPE, [*names, odd])


def test_pack_refuses_a_part_of_another_shape() -> None:
    (rule,) = WeightMap((RULES["rows"],)).expand(SHAPE)
    with pytest.raises(WeightsError, match=r"shape \(12, 8\), expected \(8, 12\)"):
        pack(rule, SHAPE, [torch.zeros(12, 8)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_sources_come_back_bit_by_bit(name: str, place: Path) -> None:
    """From whole targets, and from targets put together of two ranks' and four ranks' slices."""
    family: FamilySpec = import_module(f"autodeco_plugin_{name}.family").FAMILY
    presets = [preset for preset in family.presets if preset.name.startswith("debug")]
    assert presets
    for preset in presets:
        path = write_random_checkpoint(family, preset, place / f"{name}-{preset.name}")
        weights = open_source(family, Job(plugin=name, preset=preset.name, model=path))
        bound, shape = weights.weight_map, weights.shape
        with ShardReader(path, family.formats) as reader:
            source = Tensors({n: reader.read(n) for n in bound.source_sizes()})
        assert {n: tuple(t.shape) for n, t in source.tensors.items()} == bound.source_sizes()
        targets = {rule.target: read_target(rule, shape, source) for rule in bound.rules}
        back = dict(sources_from_targets(bound, targets.__getitem__))
        assert back.keys() == source.tensors.keys()
        for key, tensor in source.tensors.items():
            assert torch.equal(back[key], tensor), key
        for rule in bound.rules:
            assert torch.equal(targets[rule.target], whole(rule, source.tensors, shape))
            for rank in range(2):
                mine = read_target(rule, shape, source, rank, 2)
                assert torch.equal(mine, rank_slice(rule, targets[rule.target], rank, 2))
