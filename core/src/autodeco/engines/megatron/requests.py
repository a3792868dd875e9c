"""Makes the planner's request of a family's preset; `require_planner` comes before the import."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from autodeco.engines.megatron.landing import tensor_names
from autodeco.engines.megatron.plan import Request
from autodeco.family import FamilySpec, ModelPreset
from autodeco.files import read_object
from autodeco.job import Job


def request_for(
    family: FamilySpec,
    preset: ModelPreset,
    model: Path | None,
    index: Path | None,
    *,
    gpus: int,
    gpu_memory: int,
    reserve: int,
    dtype: torch.dtype,
    **changes: Any,
) -> Request:
    """Returns what is to be planned for a preset.

    Args:
        family: The preset's.
        preset: The model's sizes, and the recipe that the defaults come from.
        model: Directory with its ``config.json``; None: as the architecture says.
        index: Its ``model.safetensors.index.json``; None: the names that the weight map expects.
        gpus: Ranks.
        gpu_memory: Bytes of one of them.
        reserve: Bytes of it that are kept free.
        dtype: Of the backbone.
        **changes: Fields of `Request` that differ from the recipe; None: they do not.

    Raises:
        WeightsError: The files cannot be read, or a name is not in the weight map.
    """
    architecture = family.architecture(preset.architecture)
    config = (
        read_object(model / "config.json", who=family.id)
        if model
        else architecture.config_json(preset.shape, preset.config)
    )
    names = (
        tensor_names(index)
        if index
        else [name for rule in family.weight_map.expand(preset.shape) for name in rule.sources]
    )
    job = Job(**preset.recipe)
    request = Request(
        architecture=architecture,
        config=config,
        bound=family.weight_map.bind(
            preset.shape, names, who=family.id, where=str(index) if index else ""
        ),
        gpus=gpus,
        gpu_memory=gpu_memory,
        reserve=reserve,
        micro_batch_tokens=job.micro_batch_tokens,
        max_length=job.max_length,
        dtype=dtype,
    )
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(request, **given)
