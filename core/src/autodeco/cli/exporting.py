"""``export`` on paths: heads of any checkpoint, and the backbone of a stored one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodeco.errors import WeightsError

HEADS_OPTIONS = ("checkpoint", "save_dtype", "temperature_scale", "top_p_scale", "model")
BACKBONE_OPTIONS = ("plugin", "preset", "model")


def export_heads(
    source: Path, output: Path, values: Mapping[str, Any], dial: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the heads of a checkpoint as a heads directory.

    Args:
        source: A run of ours, its checkpoints, or one of them; a NeMo 2 checkpoint.
        output: The directory to appear.
        values: Of `HEADS_OPTIONS`.
        dial: Multipliers that the user gave.

    Returns:
        What was done.

    Raises:
        WeightsError: There is no such checkpoint, or no heads are in it.
    """
    from autodeco.convert.adapter_heads import (
        known_base,
        read_adapter_heads,
        refuse_many,
        weights_directory,
    )
    from autodeco.heads.files import load_heads, save_heads
    from autodeco.heads.identity import base_identity, check_fit
    from autodeco.training.checkpoint import STATE, find_checkpoint, list_checkpoints

    if not source.exists():
        raise WeightsError("no such checkpoint", where=str(source), fix="check --input")
    model: Path | None = values["model"]
    weights = None if (source / STATE).exists() else weights_directory(source)
    if weights is not None:
        base = known_base(weights, model)
        heads, dtype = read_adapter_heads(weights, hidden_size=base.get("hidden_size"))
        source = weights.parent if weights != source or source.name == "weights" else source
        metadata = {**base, "stored_dtype": dtype}
    else:
        if not (source / STATE).exists():
            folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
            if not list_checkpoints(folder):
                refuse_many(source)
            source = find_checkpoint(folder, values["checkpoint"])
        loaded = load_heads(source)
        heads, metadata = loaded.heads, dict(loaded.metadata)
        if model is not None:
            check_fit(model, source, metadata)
            metadata |= base_identity(model)
    metadata |= {**dial, "checkpoint": source.name}
    save_heads(output, heads, metadata=metadata, dtype=values["save_dtype"])
    return {"output": output, "checkpoint": source}


def export_backbone(source: Path, output: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the backbone of an imported or NeMo checkpoint as a Hugging Face checkpoint.

    Args:
        source: The checkpoint.
        output: The directory to appear.
        values: Of `BACKBONE_OPTIONS`.

    Returns:
        What was done.
    """
    from rich.console import Console

    from autodeco.convert.exporting import export_checkpoint
    from autodeco.convert.stored_models import model_directory, open_stored_model
    from autodeco.registry import Registry
    from autodeco.stopping import stop_at_once

    model = model_directory(source, values["model"])
    found = Registry().resolve(values["plugin"], model, values["preset"])
    stored = open_stored_model(found.family, found.preset.name, source, model)
    with stop_at_once(), stored.backbone:
        written = export_checkpoint(
            stored.backbone, stored.plan, model, output, console=Console(stderr=True)
        )
    return {
        "output": output,
        "written": written,
        "tensors": stored.plan.count,
        "bytes": stored.plan.size,
        "files": len(stored.plan.shards),
        "dropped": dict(stored.plan.dropped),
    }


def describe(done: Mapping[str, Any]) -> str:
    """Returns what `export_backbone` did, for people: a line, and one for each reason."""
    verb = "written" if done["written"] else "was there"
    text = (
        f"{done['output']}: {verb}, {done['tensors']:,} tensors, {done['bytes']:,} bytes in "
        f"{done['files']} files"
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in done["dropped"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text += f"\n  not there: {names[0]}{more} ({reason})"
    return text
