"""Which preset a checkpoint has: by name, by its sizes, or one of its own (``--preset auto``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from autodeco.errors import AutodecoError, PluginError, WeightsError
from autodeco.family import AUTO_PRESET, FamilySpec, ModelPreset, ModelShape
from autodeco.files import read_json
from autodeco.job import Job


def read_config(model: Path, who: str | None = None) -> dict[str, Any]:
    """Reads the ``config.json`` of a base checkpoint.

    Raises:
        WeightsError: It cannot be read, or is that of a merged checkpoint.
    """
    path = model / "config.json"
    config = read_json(path, who=who)
    if not isinstance(config, dict):
        raise WeightsError(
            f"the file holds a {type(config).__name__}, not an object",
            who=who,
            where=str(path),
            fix="use the config.json that came with the checkpoint",
        )
    if "autodeco" in config or config.get("model_type") == "autodeco":
        raise WeightsError(
            "this is a merged checkpoint: it has heads already",
            who=who,
            where=str(model),
            fix="give its base model; autodeco split --base takes the two apart",
        )
    return config


def architecture_of(config: Mapping[str, Any]) -> str:
    """Returns the architecture's name in a ``config.json``, "?" where there is none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "?"


def fits(family: FamilySpec, preset: ModelPreset, config: dict[str, Any], model: Path) -> bool:
    """Whether a checkpoint has a preset's architecture and shape.

    Raises:
        WeightsError: A size is missing, or a required value differs.
    """
    architecture = family.architecture(preset.architecture)
    if architecture_of(config) != architecture.name:
        return False
    return architecture.shape_of(config, where=str(model / "config.json")) == preset.shape


def preset_of(family: FamilySpec, job: Job) -> ModelPreset:
    """Returns the preset of a resolved job; for ``auto`` its checkpoint's ``config.json`` is read.

    Raises:
        PluginError: There is none of that name, or the checkpoint is of another family.
        WeightsError: The ``config.json`` cannot be read, or has no such sizes.
    """
    assert job.preset is not None
    if job.preset != AUTO_PRESET or job.model is None:
        return family.preset(job.preset)
    where = str(job.model / "config.json")
    return family.preset_for(job.preset, read_config(job.model, family.id), where=where)


def choose_preset(
    family: FamilySpec, who: str, model: Path | None, preset: str | None
) -> tuple[ModelPreset, str]:
    """Decides which preset of a family is meant, and says why.

    Args:
        family: The family.
        who: Its plugin, for messages.
        model: The checkpoint, if one is given.
        preset: The name that was asked for, if any.

    Raises:
        PluginError: There is none of that name, or none of the checkpoint's shape.
        WeightsError: The ``config.json`` cannot be read.
    """
    if model is None:
        chosen = family.preset(preset) if preset else family.presets[0]
        return chosen, "--preset" if preset else "the family's default preset"
    where = str(model / "config.json")
    config = read_config(model, who)
    try:
        architecture = family.architecture(architecture_of(config))
        shape = architecture.shape_of(config, where=where)
        chosen = family.preset_for(preset or family.presets[0].name, config, where=where)
    except AutodecoError as error:
        raise PluginError(error.what, who=who, where=where, fix=error.fix) from error
    if preset:
        if chosen.shape != shape or chosen.architecture != architecture.name:
            raise PluginError(
                f"the checkpoint is not of preset {preset!r}: {_difference(chosen.shape, shape)}",
                who=who,
                where=where,
                fix="leave --preset out, so that it is found from the checkpoint, or give "
                f"--preset {AUTO_PRESET}, for the checkpoint's own sizes",
            )
        return chosen, "--preset"
    alike = [p for p in family.presets if p.architecture == architecture.name]
    fitting = [p for p in alike if p.shape == shape]
    if fitting:
        return fitting[0], "the checkpoint's shape"
    what = "no preset has the checkpoint's shape"
    if alike:
        nearest = min(alike, key=lambda p: _distance(p.shape, shape))
        what += f"; nearest is {nearest.name!r}: {_difference(nearest.shape, shape)}"
    raise PluginError(
        what,
        who=who,
        where=where,
        fix=f"add --preset {AUTO_PRESET}: sizes as config.json has them, the layout as autodeco "
        "plan finds it; or use a checkpoint of one of the presets (autodeco plugin show)",
    )


def _distance(a: ModelShape, b: ModelShape) -> int:
    return sum(getattr(a, item.name) != getattr(b, item.name) for item in fields(ModelShape))


def _difference(expected: ModelShape, found: ModelShape) -> str:
    pairs = [
        (item.name, getattr(expected, item.name), getattr(found, item.name))
        for item in fields(ModelShape)
    ]
    return (
        ", ".join(f"{n} {e} expected, {f} found" for n, e, f in pairs if e != f) or "architecture"
    )
