"""Split a merged checkpoint into heads and base: the inverse of `autodeco.heads.merge`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodeco.errors import WeightsError
from autodeco.files import atomic_directory, atomic_write_json, read_json
from autodeco.heads.files import (
    BACKBONE_PREFIX,
    CONFIG_FILE,
    HEAD_PREFIXES,
    MERGE_KEYS,
    NATIVE_DIRECTORY,
    PUBLISHED_FILE,
    WEIGHTS_FILE,
    load_heads,
    save_heads,
)
from autodeco.heads.places import (
    AUTODECO_MODEL_TYPE,
    GENERATION_FILE,
    Tally,
    check_places,
    model_files,
)
from autodeco.heads.shards import INDEX_FILE, SINGLE_FILE, rename_tensors, weight_shards


def split(merged: Path, output: Path, *, base: Path | None = None) -> Path:
    """Takes the heads out of a merged checkpoint: the inverse of `merge`.

    Args:
        merged: a checkpoint of either layout, ours or the published one.
        output: the heads directory to appear.
        base: where to write the base model as well; its tensors keep the dtype that they have in
            `merged` (the published merge had cast them to float16 for good).

    Returns:
        `output`; of heads that we merged, every byte is what it was.

    Raises:
        UsageError: a directory to be written exists, or lies within `merged`.
        WeightsError: `merged` holds no heads, or is damaged.
        EnvironmentProblem: the output cannot be written.
    """
    merged, output = Path(merged), Path(output)
    for place in (output, base):
        if place is not None:
            check_places(merged, Path(place))
    loaded = load_heads(merged)
    config = read_json(merged / CONFIG_FILE)
    if not isinstance(config, dict):
        raise WeightsError(
            "config.json holds no object",
            where=str(merged / CONFIG_FILE),
            fix="use the config.json that the merge wrote",
        )
    if base is not None:
        _write_base(merged, config, Path(base))
    native = merged / NATIVE_DIRECTORY
    own = config.get("autodeco")
    if native / WEIGHTS_FILE in loaded.weights:
        with atomic_directory(output) as temporary:
            for name in model_files(native):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(native / name, temporary / name)
    elif isinstance(own, Mapping) and set(loaded.weights) == {merged / PUBLISHED_FILE}:
        with atomic_directory(output) as temporary:
            shutil.copyfile(merged / PUBLISHED_FILE, temporary / WEIGHTS_FILE)
            kept = {k: v for k, v in own.items() if k not in MERGE_KEYS}
            atomic_write_json(temporary / CONFIG_FILE, kept)
    else:
        save_heads(output, loaded.heads, metadata=loaded.metadata, dtype=loaded.dtype)
    return output


def _write_base(merged: Path, config: Mapping[str, Any], base: Path) -> None:
    """The base model out of a merged checkpoint; its config as it was before the merge."""
    own = config.get("autodeco")
    own = own if isinstance(own, Mapping) else {}
    published = config.get("model_type") == AUTODECO_MODEL_TYPE
    table, _ = weight_shards(merged)
    single = bool(own.get("single_file"))
    tally = Tally()
    with atomic_directory(base) as temporary:
        for name in model_files(merged):
            plain = str(name) in (CONFIG_FILE, GENERATION_FILE, PUBLISHED_FILE)
            if (
                plain
                or name.parts[0] == NATIVE_DIRECTORY
                or (published and name.name == INDEX_FILE)
            ):
                continue
            if published and str(name) in table.values():
                target = temporary / (SINGLE_FILE if single else name)
                rename_tensors(merged / name, target, _backbone_name)
            else:
                tally.bring(merged / name, temporary / name, copy=False)
        if published and not single and (merged / INDEX_FILE).exists():
            names = {_backbone_name(n): s for n, s in table.items()}
            kept = {n: s for n, s in names.items() if n is not None}
            size = sum((temporary / s).stat().st_size for s in set(kept.values()))
            index = {"metadata": {"total_size": size}, "weight_map": kept}
            atomic_write_json(temporary / INDEX_FILE, index)
        atomic_write_json(temporary / CONFIG_FILE, restored_config(config, published=published))
        _restore_generation_config(merged, own, temporary)


def _backbone_name(name: str) -> str | None:
    return None if name.startswith(HEAD_PREFIXES) else name.removeprefix(BACKBONE_PREFIX)


_PUBLISHED_KEYS = (
    "base_architectures",
    "base_model_type",
    "base_model_name_or_path",
    "enable_temperature_head",
    "enable_top_p_head",
    "use_enhanced_features",
)


def restored_config(config: Mapping[str, Any], *, published: bool) -> dict[str, Any]:
    restored = {key: value for key, value in config.items() if key != "autodeco"}
    if published:
        restored["model_type"] = config.get("base_model_type")
        restored["architectures"] = config.get("base_architectures")
        restored = {k: v for k, v in restored.items() if k not in _PUBLISHED_KEYS}
        if restored["architectures"] is None:
            del restored["architectures"]
    return restored


def _restore_generation_config(merged: Path, own: Mapping[str, Any], base: Path) -> None:
    if not (merged / GENERATION_FILE).exists() or own.get("generation_config", {}) is None:
        return
    generation = dict(read_json(merged / GENERATION_FILE))
    if "generation_config" in own:
        generation.pop("do_sample", None)
        generation.update(own["generation_config"])
    atomic_write_json(base / GENERATION_FILE, generation)
