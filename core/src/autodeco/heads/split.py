"""Split a merged checkpoint into heads and base: the inverse of `autodeco.heads.merge`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodeco.disk_space import require_space
from autodeco.errors import WeightsError
from autodeco.files import (
    atomic_directory,
    atomic_write_json,
    fetch_hint,
    read_json,
    read_object,
    remove,
)
from autodeco.heads.files import (
    BACKBONE_PREFIX,
    HEAD_PREFIXES,
    MERGE_KEYS,
    NATIVE_DIRECTORY,
    PUBLISHED_FILE,
    WEIGHTS_FILE,
    LoadedHeads,
    load_heads,
    save_heads,
)
from autodeco.heads.identity import AUTODECO_MODEL_TYPE, CONFIG_FILE
from autodeco.heads.places import (
    GENERATION_FILE,
    WEIGHT_SUFFIXES,
    Progress,
    Tally,
    alone_at,
    check_places,
    model_files,
    require_ways,
    silent,
    weight_files,
)
from autodeco.heads.shards import in_threads, restore_shard
from autodeco.safetensors_header import INDEX, SINGLE, TensorInfo, read_checkpoint, read_index

_SCRATCH = "heads.partial"


def split(
    merged: Path,
    output: Path,
    *,
    base: Path | None = None,
    copy: bool = False,
    progress: Progress = silent,
) -> Path:
    """Takes the heads out of a merged checkpoint: the inverse of `merge`.

    Args:
        merged: a checkpoint of either layout, ours or the published one.
        output: the heads directory to appear.
        base: where to write the base model as well; its tensors keep the dtype that they have in
            `merged` (the published merge had cast them to float16 for good).
        copy: copy the weight files of a `native` checkpoint instead of linking them.
        progress: shows how many bytes of the base are written.

    Returns:
        `output`; of heads that we merged, every byte is what it was.

    Raises:
        UsageError: a directory to be written exists, or lies within `merged`.
        WeightsError: `merged` holds no heads, or is damaged.
        RunError: another process is writing one of the directories.
        EnvironmentProblem: the output cannot be written, or the weights be neither linked nor
            reflinked to `base` and `copy` is False.
    """
    merged, output = Path(merged), Path(output)
    base = None if base is None else Path(base)
    # A split that was killed between its two directories goes on with the second.
    half_done = base is not None and output.is_dir() and not base.exists()
    for place in (base,) if half_done else (output, base):
        if place is not None:
            check_places(merged, place)
    loaded = load_heads(merged)
    config = _merged_config(merged)
    published = config.get("model_type") == AUTODECO_MODEL_TYPE
    tensors = read_checkpoint(merged)
    _check_names(merged, tensors, published=published)
    if base is None:
        with alone_at(output), atomic_directory(output) as temporary:
            _write_heads(merged, loaded, config, temporary)
        return output
    if not published:
        require_ways(merged, base, "native", copy=copy)
    with alone_at(output, base), atomic_directory(base) as temporary:
        scratch = temporary / _SCRATCH
        scratch.mkdir()
        _write_heads(merged, loaded, config, scratch)
        if half_done and _content(scratch) != _content(output):
            check_places(merged, output)  # they are others: the output exists
        _write_base(merged, config, tensors, temporary, copy=copy, progress=progress)
        if not half_done:
            with atomic_directory(output) as heads:
                shutil.copytree(scratch, heads, dirs_exist_ok=True)
        remove(scratch)
    return output


def _content(directory: Path) -> dict[str, bytes]:
    return {str(name): (directory / name).read_bytes() for name in model_files(directory)}


def _merged_config(merged: Path) -> Mapping[str, Any]:
    if not merged.is_dir():
        raise WeightsError(
            "a file of heads has no base to be taken from",
            where=str(merged),
            fix=fetch_hint(merged) or "give the directory of a merged checkpoint",
        )
    config = read_json(merged / CONFIG_FILE)
    if not isinstance(config, dict):
        raise WeightsError(
            "config.json holds no object",
            where=str(merged / CONFIG_FILE),
            fix="use the config.json that the merge wrote",
        )
    return config


def _check_names(merged: Path, tensors: Mapping[str, TensorInfo], *, published: bool) -> None:
    """Each tensor of the `autodeco` layout is of a head or of the backbone; of `native`, of none.

    What the heads are made of, `load_heads` has checked.
    """
    heads = [name for name in tensors if name.startswith(HEAD_PREFIXES)]
    backbone = [name for name in tensors if name.startswith(BACKBONE_PREFIX)]
    wrong = sorted(set(tensors) - set(heads) - set(backbone)) if published else heads + backbone
    if wrong:
        raise WeightsError(
            f"tensor {wrong[0]!r} does not belong into this layout",
            where=str(tensors[wrong[0]].file),
            fix="the checkpoint is damaged or was merged by another tool: merge again",
        )


def _write_heads(
    merged: Path, loaded: LoadedHeads, config: Mapping[str, Any], output: Path
) -> None:
    native = merged / NATIVE_DIRECTORY
    own = config.get("autodeco")
    if native / WEIGHTS_FILE in loaded.weights:
        for name in model_files(native):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(native / name, output / name)
    elif isinstance(own, Mapping) and set(loaded.weights) == {merged / PUBLISHED_FILE}:
        shutil.copyfile(merged / PUBLISHED_FILE, output / WEIGHTS_FILE)
        kept = {k: v for k, v in own.items() if k not in MERGE_KEYS}
        atomic_write_json(output / CONFIG_FILE, kept)
    else:
        save_heads(output, loaded.heads, metadata=loaded.metadata, dtype=loaded.dtype, replace=True)


def _write_base(
    merged: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    output: Path,
    *,
    copy: bool,
    progress: Progress,
) -> None:
    """The base model out of a merged checkpoint; its config as it was before the merge."""
    own = config.get("autodeco")
    own = own if isinstance(own, Mapping) else {}
    published = config.get("model_type") == AUTODECO_MODEL_TYPE
    rewritten = (CONFIG_FILE, GENERATION_FILE, *((INDEX, PUBLISHED_FILE) if published else ()))
    for name in model_files(merged):
        weights = name.suffix in WEIGHT_SUFFIXES
        if not (weights or str(name) in rewritten or name.parts[0] == NATIVE_DIRECTORY):
            Tally().bring_small(merged / name, output / name)
    if published:
        stored = _write_backbone(merged, own, tensors, output, progress)
        restored = restored_config(config, published=True)
        if not own:
            restored = _as_stored(restored, stored)
    else:
        files = [name for name in weight_files(merged) if name.parts[0] != NATIVE_DIRECTORY]
        Tally().bring_weights(files, merged, output, copy=copy, progress=progress)
        restored = restored_config(config, published=False)
    atomic_write_json(output / CONFIG_FILE, restored)
    _restore_generation_config(merged, own, output)


def _write_backbone(
    merged: Path,
    own: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    output: Path,
    progress: Progress,
) -> set[str]:
    """Writes the shards and the index of the backbone; returns the dtypes in them."""
    index = read_index(merged) if (merged / INDEX).exists() else None
    names = index["weight_map"] if index else tensors
    table = {name: tensors[name].file.name for name in names if name.startswith(BACKBONE_PREFIX)}
    single = bool(own.get("single_file")) and len(set(table.values())) == 1
    shards = [
        restore_shard(merged / shard, output / (SINGLE if single else shard), backbone_name)
        for shard in dict.fromkeys(table.values())
    ]
    total = sum(shard.size for shard in shards)
    require_space(output, total, "the base model")
    with progress(total) as bar:
        in_threads([shard.write for shard in shards], bar.advance)
    if index and not single:
        size = sum(tensors[name].size for name in table)
        weight_map = {backbone_name(name): shard for name, shard in table.items()}
        metadata = own.get("index_metadata", {"total_size": size})
        content = {} if metadata is None else {"metadata": metadata}
        atomic_write_json(output / INDEX, {**content, "weight_map": weight_map})
    return {tensors[name].dtype for name in table}


def backbone_name(name: str) -> str | None:
    """The name in the base of a tensor of the `autodeco` layout; None for a head's."""
    return None if name.startswith(HEAD_PREFIXES) else name.removeprefix(BACKBONE_PREFIX)


_PUBLISHED_KEYS = (
    "base_architectures",
    "base_model_type",
    "base_model_name_or_path",
    "enable_temperature_head",
    "enable_top_p_head",
    "use_enhanced_features",
    "temperature_hidden_size",
    "top_p_hidden_size",
)
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def restored_config(config: Mapping[str, Any], *, published: bool) -> dict[str, Any]:
    """The config of the base in that of a merged checkpoint."""
    restored = {key: value for key, value in config.items() if key != "autodeco"}
    if published:
        restored["model_type"] = config.get("base_model_type")
        restored["architectures"] = config.get("base_architectures") or _architectures(
            config.get("base_model_type")
        )
        restored = {k: v for k, v in restored.items() if k not in _PUBLISHED_KEYS}
        if restored["architectures"] is None:
            del restored["architectures"]
    return restored


def _architectures(model_type: Any) -> list[str] | None:
    """What transformers calls the causal model of a type: the published config does not say."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return [name] if isinstance(name, str) else None


def _as_stored(config: dict[str, Any], stored: set[str]) -> dict[str, Any]:
    """Corrects what the published merge left as it was: it had decoded and cast the weights."""
    if stored <= set(_FLOATS):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    if len(stored) == 1 and stored <= set(_FLOATS):
        dtype = _FLOATS[next(iter(stored))]
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return config


def _restore_generation_config(merged: Path, own: Mapping[str, Any], base: Path) -> None:
    if not (merged / GENERATION_FILE).exists() or own.get("generation_config", {}) is None:
        return
    generation = read_object(merged / GENERATION_FILE)
    if "generation_config" in own:
        generation.pop("do_sample", None)
        if not isinstance(own["generation_config"], Mapping):
            raise WeightsError(
                "the base's own generation_config is no object",
                where=f"{merged / CONFIG_FILE}: autodeco.generation_config",
                fix="use the config.json that the merge wrote",
            )
        generation.update(own["generation_config"])
    atomic_write_json(base / GENERATION_FILE, generation)
