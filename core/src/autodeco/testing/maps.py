"""Checks of the weight map: against itself, transformers, published names and the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autodeco.convert.operations import read_target, sources_from_targets
from autodeco.convert.shards import ShardReader
from autodeco.engines.megatron.landing import tensor_names
from autodeco.errors import WeightsError
from autodeco.family import ModelPreset
from autodeco.layout import ParallelLayout
from autodeco.storage import BUILT_IN, StorageFormat
from autodeco.testing.checks import CheckFailed, NotRun
from autodeco.testing.context import Context, empty_model, quiet, stock_config
from autodeco.weights import BoundWeightMap, Dims, source_sizes

_SHOWN = 3
_GPU_MEMORY = 1 << 50  # nothing is asked of it


def own_names(context: Context, preset: ModelPreset) -> BoundWeightMap:
    """Returns the map, bound to the names that it asks for itself."""
    weight_map = context.family.weight_map
    names = source_sizes(weight_map.expand(preset.shape))
    return weight_map.bind(preset.shape, names, who=context.who)


def expansion(context: Context) -> str:
    """Every preset's rules, all layers and experts filled in; random ones have no square matrix."""
    largest = ("", 0)
    for preset in context.family.presets:
        count = len(context.sizes(preset))
        if not count:
            raise CheckFailed(
                "the map reads no tensor", where=f"preset {preset.name}", fix="write its rules"
            )
        if preset.random:
            _rectangular(context, preset)
        largest = max(largest, (preset.name, count), key=lambda item: item[1])
    return f"{len(context.family.presets)} presets; the largest, {largest[0]}, {largest[1]} tensors"


def _rectangular(context: Context, preset: ModelPreset) -> None:
    """A transposed matrix of a random preset must show in its shape, where it can."""
    full = [
        context.sizes(p)
        for p in context.family.presets
        if p.model_ids and p.architecture == preset.architecture
    ]
    for name, size in context.sizes(preset).items():
        always = full and all(len(set(of.get(name, (1, 2))[-2:])) == 1 for of in full)
        if len(size) > 1 and size[-1] == size[-2] and not always:
            raise CheckFailed(
                f"{name!r} is square, {size}: transposed, it would go unseen",
                where=f"preset {preset.name}",
                fix="choose other sizes for this preset, so that the dimensions of every matrix "
                "differ",
            )


def transformers_names(context: Context) -> str:
    """Names and shapes: small models are really saved, full ones are built without bytes."""
    elements = 0
    for preset in context.family.presets:
        config = context.architecture(preset).config_json(preset.shape, preset.config)
        where = f"preset {preset.name}, transformers' {preset.architecture}"
        if preset.random:
            found = _saved_sizes(config, context.work / f"saved-{preset.name}")
            _compare(context, preset, found, f"{where}, save_pretrained")
        found = _sizes_at_full_size(config)
        _compare(context, preset, found, where)
        elements = max(elements, sum(prod(size) for size in found.values()))
    return f"{len(context.family.presets)} presets, up to {elements:,} elements, names and shapes"


def _saved_sizes(config: Mapping[str, Any], directory: Path) -> dict[str, Dims]:
    from transformers import AutoModelForCausalLM

    with quiet():
        AutoModelForCausalLM.from_config(stock_config(config)).save_pretrained(directory)
    sizes: dict[str, Dims] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                sizes[name] = tuple(content.get_slice(name).get_shape())
    return sizes


def _sizes_at_full_size(config: Mapping[str, Any]) -> dict[str, Dims]:
    """Returns what `save_pretrained` would write: fused experts come apart again."""
    from transformers.core_model_loading import revert_weight_conversion

    model = empty_model(config)
    tied = model.all_tied_weights_keys
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    saved = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _compare(context: Context, preset: ModelPreset, found: Mapping[str, Dims], where: str) -> None:
    try:
        context.family.weight_map.bind(preset.shape, found, who=context.who, where=where)
    except WeightsError as error:
        raise CheckFailed(error.what, where=where, fix=_repair(error)) from error
    sizes = context.sizes(preset)
    wrong = [name for name, size in sizes.items() if found[name] != size]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} tensors have other shapes, the first is {wrong[0]!r}: "
            f"{found[wrong[0]]} there, {sizes[wrong[0]]} in the map",
            where=where,
            fix="correct the size of its rule (outputs first, unless it is `transposed`)",
        )


def _repair(error: WeightsError) -> str:
    if "missing" in error.what:
        return "the map asks for a tensor that there is not: correct the rule's name, or its `when`"
    return "add a rule for them to the weight map, or a Drop with a reason"


def index(context: Context) -> str:
    """The names of published checkpoints, where they are given."""
    if not context.index:
        raise NotRun(
            "no index is given",
            fix="add --index FILE (a model.safetensors.index.json), or `index` in the test",
            excused=True,
        )
    said = []
    for name, given in context.index.items():
        stored = _names_of(given)
        names = whole_names(stored, context.family.formats)
        where = str(given) if isinstance(given, Path) else f"the index of {name}"
        candidates = [context.family.preset(name)] if name else list(context.family.presets)
        preset, bound = _bind_first(context, candidates, names, where)
        said.append(f"{preset.name}: {len(stored)} names, {len(bound.dropped)} dropped")
    return "; ".join(said)


def _names_of(given: Path | Sequence[str]) -> Sequence[str]:
    return tensor_names(given) if isinstance(given, Path) else given


def whole_names(stored: Collection[str], formats: Sequence[StorageFormat]) -> set[str]:
    """Returns the names of the model's tensors among those that are stored, parts put together."""
    names = set(stored)
    for one in (*formats, *BUILT_IN):
        suffixes = [part.suffix for part in one.parts.values()]
        longest = max(suffixes, key=len)
        for name in [n for n in names if n.endswith(longest)]:
            base = name.removesuffix(longest)
            if all(base + suffix in names for suffix in suffixes):
                names -= {base + suffix for suffix in suffixes}
                names.add(base)
    return names


def _bind_first(
    context: Context, candidates: Sequence[ModelPreset], names: Collection[str], where: str
) -> tuple[ModelPreset, BoundWeightMap]:
    failures: list[tuple[int, WeightsError]] = []
    for preset in candidates:
        try:
            bound = context.family.weight_map.bind(
                preset.shape, names, who=context.who, where=f"{where}, preset {preset.name}"
            )
        except WeightsError as error:
            failures.append((len(context.sizes(preset).keys() ^ names), error))
        else:
            return preset, bound
    nearest = min(failures, key=lambda failure: failure[0])[1]
    raise CheckFailed(nearest.what, where=nearest.where, fix=_repair(nearest)) from nearest


def engine_names(context: Context) -> str:
    """Builds each preset's model on the meta device, and books where every tensor lands."""
    context.require_megatron()
    context.leave_groups()
    landed = []
    for preset in context.family.presets:
        if not context.architecture(preset).no_megatron:
            landed.append(_land(context, _few_layers(preset), ParallelLayout(), 1))
    if not landed:
        context.require_megatron(context.family.presets[0])
    return f"{len(landed)} presets at full width, the largest {max(landed):,} elements"


def _land(context: Context, preset: ModelPreset, layout: ParallelLayout, ranks: int) -> int:
    """Returns the elements that land once in each copy of the model.

    Raises:
        CheckFailed: They do not.
    """
    with quiet():
        from autodeco.engines.megatron.plan import Request, plan_layout
    architecture = context.architecture(preset)
    request = Request(
        architecture=architecture,
        config=architecture.config_json(preset.shape, preset.config),
        bound=own_names(context, preset),
        gpus=ranks,
        gpu_memory=_GPU_MEMORY,
        reserve=0,
        micro_batch_tokens=16,
        max_length=16,
    )
    try:
        with quiet():
            plan = plan_layout(request, layout)
    except WeightsError as error:
        where = f"preset {preset.name}, layout {layout}" + (f", {error.where}" * bool(error.where))
        raise CheckFailed(error.what, where=where, fix=error.fix) from error
    assert plan.landing is not None
    return plan.landing.elements


def _few_layers(preset: ModelPreset) -> ModelPreset:
    """Keeps one layer of each kind and one more: the others have the same names."""
    shape = preset.shape
    layers = min(shape.num_layers, shape.dense_layers + 2)
    lists = {
        key: value[:layers]
        for key, value in preset.config.items()
        if isinstance(value, list | tuple) and len(value) == shape.num_layers
    }
    return dataclasses.replace(
        preset,
        shape=dataclasses.replace(shape, num_layers=layers),
        config={**preset.config, **lists},
    )


def landing(context: Context) -> str:
    """Every rank of every published preset, at the preset's own layout."""
    context.require_megatron()
    context.leave_groups()
    said = []
    for preset in context.family.presets:
        if preset.model_ids and not context.architecture(preset).no_megatron:
            elements = _land(context, preset, preset.layout, preset.layout.gpus)
            said.append(f"{preset.name} {preset.layout} x {preset.layout.gpus}: {elements:,}")
    if not said:
        raise NotRun(
            "no preset is of a published model that the megatron engine can run",
            fix="give a preset its model_ids",
            excused=True,
        )
    return "; ".join(said)


def round_trip(context: Context) -> str:
    """Packs a random checkpoint's tensors and unpacks them again."""
    count = elements = 0
    for preset in context.random_presets:
        model = context.model(preset)
        with ShardReader(model, context.family.formats) as reader:
            bound = context.family.weight_map.bind(
                preset.shape, reader.tensors, who=context.who, where=str(model)
            )
            seen = set()
            for name, tensor in sources_from_targets(bound, _targets(bound, reader)):
                _same_bytes(name, tensor, reader.read(name), preset)
                seen.add(name)
                elements += tensor.numel()
        missing = sorted(reader.tensors.keys() - seen - bound.dropped.keys())
        if missing:
            raise CheckFailed(
                f"{missing[0]!r} does not come back",
                where=f"preset {preset.name}",
                fix="correct its rule in the weight map",
            )
        count += len(seen)
    return f"{count} tensors, {elements:,} elements, every byte"


def _targets(bound: BoundWeightMap, reader: ShardReader) -> Any:
    rules = {rule.target: rule for rule in bound.rules}
    return lambda target: read_target(rules[target], bound.shape, reader)


def _same_bytes(name: str, found: Tensor, original: Tensor, preset: ModelPreset) -> None:
    same = found.shape == original.shape and found.dtype == original.dtype
    if not same or not torch.equal(_bytes(found), _bytes(original)):
        raise CheckFailed(
            f"{name!r} comes back as another tensor: {found.dtype} {tuple(found.shape)}, "
            f"it was {original.dtype} {tuple(original.shape)}",
            where=f"preset {preset.name}",
            fix="correct its rule in the weight map",
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
