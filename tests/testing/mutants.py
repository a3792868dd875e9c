"""Plugins that are broken in one place each, made of the shipped families' data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodeco.engines.base import HiddenBatch, TokenBatch
from autodeco.family import FamilySpec
from autodeco.hookspecs import BuiltModel, HeadedModel, HeadsArtifact, ImportedWeights
from autodeco.job import Job
from autodeco.plugin import FamilyPlugin
from autodeco.registry import PluginRow
from autodeco.storage import FP8_BLOCKS
from autodeco.weights import Rule
from autodeco_plugin_deepseek_v3.family import FAMILY as DEEPSEEK
from autodeco_plugin_gpt_oss.family import FAMILY as GPT_OSS
from autodeco_plugin_qwen3.family import FAMILY as QWEN3


def row_of(plugin: FamilyPlugin | FamilySpec) -> PluginRow:
    """A plugin that is not installed, as discovery would give it."""
    if isinstance(plugin, FamilySpec):
        plugin = FamilyPlugin(plugin)
    return PluginRow(plugin.family.id, "a-mutant", "0", plugin, None)


def small(family: FamilySpec, *names: str) -> FamilySpec:
    """Keeps some presets: the checks of the others cost time and prove nothing here."""
    return dataclasses.replace(family, presets=tuple(family.preset(n) for n in names))


def with_rules(family: FamilySpec, change: Callable[[Rule], Rule | None]) -> FamilySpec:
    """Changes each rule of the weight map; None drops it. One must change."""
    rules = tuple(r for rule in family.weight_map.rules if (r := change(rule)) is not None)
    assert rules != family.weight_map.rules
    return dataclasses.replace(
        family, weight_map=dataclasses.replace(family.weight_map, rules=rules)
    )


def with_megatron(family: FamilySpec, **fields: Any) -> FamilySpec:
    """Changes fields that megatron-core is given."""
    architectures = tuple(
        dataclasses.replace(a, megatron={**a.megatron, **fields}) for a in family.architectures
    )
    return dataclasses.replace(family, architectures=architectures)


def with_architecture(family: FamilySpec, **fields: Any) -> FamilySpec:
    """Changes fields of every architecture."""
    architectures = tuple(dataclasses.replace(a, **fields) for a in family.architectures)
    return dataclasses.replace(family, architectures=architectures)


def swapped(family: FamilySpec, one: str, other: str) -> FamilySpec:
    """The sources of two targets change places."""
    sources = {
        rule.target.rpartition("}.")[2]: rule.sources
        for rule in family.weight_map.rules
        if rule.target.endswith((one, other))
    }
    assert len(sources) == 2
    exchange = {one: sources[other], other: sources[one]}

    def change(rule: Rule) -> Rule:
        end = rule.target.rpartition("}.")[2]
        return dataclasses.replace(rule, sources=exchange.get(end, rule.sources))

    return with_rules(family, change)


SMALL_QWEN3 = small(QWEN3, "debug", "0.6b")
SMALL_GPT_OSS = small(GPT_OSS, "debug")
SMALL_DEEPSEEK = small(DEEPSEEK, "debug")


def _k_and_v_swapped(rule: Rule) -> Rule:
    if rule.kind != "qkv":
        return rule
    q, k, v = rule.sources
    return dataclasses.replace(rule, sources=(q, v, k))


def _without_down(rule: Rule) -> Rule | None:
    return None if "down_proj" in rule.sources[0] else rule


def _down_transposed(rule: Rule) -> Rule:
    down = "down_proj" in rule.sources[0]
    return dataclasses.replace(rule, transposed=True) if down else rule


def _not_interleaved(rule: Rule) -> Rule:
    if not rule.interleaved:
        return rule

    def halves(shape: Any) -> tuple[tuple[int, ...], ...]:
        (size,) = rule.sizes(shape)
        return ((size[0] // 2, *size[1:]),) * 2

    return dataclasses.replace(rule, interleaved=False, sizes=halves)


def _split_otherwise(rule: Rule) -> Rule:
    wrong = rule.target.endswith("linear_proj.weight")
    return dataclasses.replace(rule, parallel_dim=0) if wrong else rule


def _square() -> FamilySpec:
    debug = SMALL_QWEN3.preset("debug")
    shape = dataclasses.replace(debug.shape, ffn_size=debug.shape.hidden_size)
    presets = (dataclasses.replace(debug, shape=shape), SMALL_QWEN3.preset("0.6b"))
    return with_rules(dataclasses.replace(SMALL_QWEN3, presets=presets), _down_transposed)


def decode_without_scale(parts: dict[str, Tensor]) -> Tensor:
    """What the published code did where a scale was missing."""
    return parts["weight"].float() * 1e-3


def _with_config(family: FamilySpec, **changes: Any) -> FamilySpec:
    presets = tuple(dataclasses.replace(p, config={**p.config, **changes}) for p in family.presets)
    return dataclasses.replace(family, presets=presets)


def _rule_twice() -> FamilySpec:
    rules = QWEN3.weight_map.rules
    again = dataclasses.replace(rules[-1], target="another.weight")
    weight_map = dataclasses.replace(QWEN3.weight_map, rules=(*rules, again, again))
    return dataclasses.replace(small(QWEN3, "debug-moe", "30b-a3b"), weight_map=weight_map)


RULE_TWICE = _rule_twice()
WIDE_WINDOW = _with_config(SMALL_GPT_OSS, sliding_window=512)
HIGH_CLAMP = _with_config(SMALL_GPT_OSS, swiglu_limit=1e4)
KV_SWAPPED = with_rules(SMALL_QWEN3, _k_and_v_swapped)
RULE_DROPPED = with_rules(SMALL_QWEN3, _without_down)
DOWN_TRANSPOSED = with_rules(SMALL_QWEN3, _down_transposed)
DOWN_TRANSPOSED_SQUARE = _square()
NORMS_SWAPPED = swapped(SMALL_QWEN3, "input_layernorm.weight", "pre_mlp_layernorm.weight")
QK_NORMS_SWAPPED = swapped(
    SMALL_QWEN3, "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"
)
NOT_INTERLEAVED = with_rules(SMALL_GPT_OSS, _not_interleaved)
WINDOW_TOO_WIDE = with_megatron(SMALL_GPT_OSS, window_size=(8, 0))
NO_CLAMP = with_megatron(SMALL_GPT_OSS, activation_func_clamp_value=None)
NO_SINKS = with_megatron(SMALL_GPT_OSS, softmax_type="vanilla")
SCALE_SKIPPED = dataclasses.replace(
    SMALL_DEEPSEEK,
    formats=(dataclasses.replace(FP8_BLOCKS, decode="mutants:decode_without_scale"),),
)
SPLIT_OTHERWISE = FamilyPlugin(with_rules(SMALL_QWEN3, _split_otherwise))


class OtherModel(FamilyPlugin):
    """The hf engine gets a model that is not the checkpoint's."""

    def build_model(self, job: Job, weights: ImportedWeights) -> BuiltModel:
        built = super().build_model(job, weights)
        if built.engine.name == "hf":
            built.engine.model.model.norm.weight.mul_(1.01)
        return built


class Unfrozen(FamilyPlugin):
    """One layer takes gradients."""

    def build_model(self, job: Job, weights: ImportedWeights) -> BuiltModel:
        built = super().build_model(job, weights)
        if built.engine.name == "hf":
            built.engine.model.model.layers[1].requires_grad_(True)
        return built


class _Drifting:
    """An engine whose backbone moves by a rounding error with every batch."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @torch.no_grad()
    def hidden_states(self, batches: Iterable[TokenBatch]) -> Iterator[HiddenBatch | None]:
        self._engine.model.model.norm.weight[0] *= 1 + 2e-7
        yield from self._engine.hidden_states(batches)


class Drifting(FamilyPlugin):
    """The backbone changes, by less than any logit shows."""

    def build_model(self, job: Job, weights: ImportedWeights) -> BuiltModel:
        built = super().build_model(job, weights)
        return BuiltModel(_Drifting(built.engine), weights) if job.engine == "hf" else built


class HeadsOfAnotherWidth(FamilyPlugin):
    """Heads for a larger model."""

    def attach_heads(self, job: Job, model: BuiltModel) -> HeadedModel:
        from autodeco.heads.attach import new_heads

        return HeadedModel(model, new_heads(job, model.hidden_size + 1, torch.device("cpu")))


class FrozenHeads(FamilyPlugin):
    """Heads that do not learn."""

    def attach_heads(self, job: Job, model: BuiltModel) -> HeadedModel:
        headed = super().attach_heads(job, model)
        headed.heads.temp_head.requires_grad_(False)
        return headed


class NewHeadsExported(FamilyPlugin):
    """The heads directory gets heads that were never trained."""

    def export_heads(self, job: Job, model: HeadedModel, path: Path) -> HeadsArtifact:
        fresh = super().attach_heads(job, model.model)
        return super().export_heads(job, HeadedModel(model.model, fresh.heads), path)


class Hanging(FamilyPlugin):
    """A rank that never comes."""

    def build_model(self, job: Job, weights: ImportedWeights) -> BuiltModel:
        print("rank is asleep", flush=True)
        time.sleep(600)
        raise AssertionError


HANGING = Hanging(SMALL_QWEN3)
