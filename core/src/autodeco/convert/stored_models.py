"""Opens a stored model for an export: finds its weight map and where its targets lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autodeco.convert.adapter_heads import refuse_many, weights_directory
from autodeco.convert.backbones import (
    Backbone,
    ImportedBackbone,
    KeyedBackbone,
    imported_directory,
)
from autodeco.convert.export_plan import SHARD_BYTES, ExportPlan, plan_export
from autodeco.convert.stored import HF_FILES
from autodeco.errors import UsageError, WeightsError
from autodeco.family import Architecture, FamilySpec, ModelShape
from autodeco.hookspecs import ImportedWeights
from autodeco.resolution import read_config
from autodeco.safetensors_header import INDEX, SINGLE, read_header, read_index
from autodeco.weights import BoundWeightMap

_CONFIG = "config.json"


@dataclass(frozen=True)
class StoredModel:
    """A stored model and what its export will be.

    Attributes:
        backbone: It, not yet open.
        plan: The files of the export.
        model: Where config.json, tokenizer and the like are.
    """

    backbone: Backbone
    plan: ExportPlan
    model: Path


def model_directory(source: Path, model: Path | None) -> Path:
    """Returns the directory with the ``config.json`` of a stored model.

    Args:
        source: An imported checkpoint, or another directory that torch.distributed.checkpoint
            has written.
        model: What the user gave.

    Raises:
        UsageError: There is none.
    """
    if model is not None:
        return model
    imported = imported_directory(source)
    if imported is not None and (imported / HF_FILES / _CONFIG).is_file():
        return imported / HF_FILES
    raise UsageError(
        "the stored model has no config.json beside it",
        where=str(source),
        fix="add --model DIR with config.json and the tokenizer of the model it was made from",
    )


def open_stored_model(
    family: FamilySpec, preset: str, source: Path, model: Path, *, limit: int = SHARD_BYTES
) -> StoredModel:
    """Finds every target of a model in a stored checkpoint; reads no tensor.

    Args:
        family: The plugin's data.
        preset: The preset's name; ``auto``: the sizes of config.json.
        source: See `model_directory`.
        model: See there.
        limit: Bytes of the tensors in a file of the export.

    Raises:
        WeightsError: The stored checkpoint is incomplete or damaged, or of another model.
        UsageError: There are several checkpoints in the directory.
        EnvironmentProblem: It is no import of ours, and megatron-core is not installed.
    """
    where = str(model / _CONFIG)
    config = read_config(model, family.id)
    chosen = family.preset_for(preset, config, where=where)
    architecture = family.architecture(chosen.architecture)
    shape = architecture.shape_of(config, where=where)
    if shape != chosen.shape:
        raise WeightsError(
            f"config.json does not agree with preset {chosen.name!r}: {shape} is not "
            f"{chosen.shape}",
            who=family.id,
            where=where,
            fix="choose the preset of this size: autodeco plugin show " + family.id,
        )
    dropped = _dropped(family, shape, _stored_names(model))
    bound = BoundWeightMap(shape, family.weight_map.expand(shape), dropped)
    backbone = _backbone(source, model, bound, architecture, config)
    plan = plan_export(bound, backbone.dtype, limit=limit, dropped=backbone.left_out)
    return StoredModel(backbone, plan, model)


def _backbone(
    source: Path,
    model: Path,
    bound: BoundWeightMap,
    architecture: Architecture,
    config: Mapping[str, object],
) -> Backbone:
    imported = imported_directory(source)
    if imported is not None:
        return ImportedBackbone(imported, bound)
    weights = weights_directory(source)
    if weights is None:
        refuse_many(source)
        raise WeightsError(
            "the directory has no .metadata, neither itself nor in weights/",
            where=str(source),
            fix="give a checkpoint of autodeco import, of NeMo 2 or of megatron-core",
        )
    from autodeco.engines.select import require_megatron

    require_megatron("reading the keys of NeMo and megatron-core needs megatron-core")
    from autodeco.engines.megatron.model_layout import model_layout

    weights_of = ImportedWeights(model, "hf", bound, bound.shape)
    return KeyedBackbone(weights, bound, model_layout(weights_of, architecture, config))


def _stored_names(model: Path) -> tuple[str, ...]:
    """The names of a Hugging Face checkpoint's tensors, if they are told; its shards may lack."""
    if (model / INDEX).is_file():
        return tuple(read_index(model)["weight_map"])
    return tuple(read_header(model / SINGLE)) if (model / SINGLE).is_file() else ()


def _dropped(family: FamilySpec, shape: ModelShape, names: Iterable[str]) -> dict[str, str]:
    """Returns which of the source's tensors are in no export -> why; patterns without names."""
    drops = family.weight_map.drops
    names = tuple(names)
    if not names:
        return {d.pattern.replace("{layer}", str(shape.num_layers)): d.reason for d in drops}
    found = {n: d.reason for n in names for d in drops if d.matches(n, shape)}
    twins = {t: r.sources[0] for r in family.weight_map.expand(shape) for t in r.rule.twins}
    same = {n: f"stored twice: the same tensor as {twins[n]}" for n in names if n in twins}
    return {**found, **same}
