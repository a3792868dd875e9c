"""Merge heads into a checkpoint, and split them off again; no base tensor is ever cast.

Two layouts (docs: "The heads on disk"): `native`, which any tool loads as the base model, and
`autodeco`, the layout of the published models, with the backbone under ``llm.``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import UsageError, WeightsError
from autodeco.files import atomic_directory, atomic_write_json, fetch_hint, read_object, remove
from autodeco.heads.files import (
    BACKBONE_PREFIX,
    HEAD_PREFIXES,
    HEADS_MODEL_TYPE,
    NATIVE_DIRECTORY,
    PUBLISHED_FILE,
    WEIGHTS_FILE,
    LoadedHeads,
    load_heads,
    save_heads,
)
from autodeco.heads.identity import AUTODECO_MODEL_TYPE, CONFIG_FILE, base_identity, check_fit
from autodeco.heads.places import (
    GENERATION_FILE,
    RENAMED_SINGLE,
    WEIGHT_SUFFIXES,
    Progress,
    Tally,
    alone_at,
    can_be_shared,
    check_places,
    model_files,
    require_ways,
    silent,
    weight_files,
)
from autodeco.heads.shards import RenamedShard, in_threads, rename_shard
from autodeco.heads.split import backbone_name, split
from autodeco.safetensors_header import INDEX, SINGLE, TensorInfo, read_checkpoint, read_index

__all__ = ["LAYOUTS", "MergeReport", "merge", "split"]

LAYOUTS = ("native", "autodeco")
AUTODECO_ARCHITECTURE = "AutoDecoModelForCausalLM"
_SCRATCH = "heads.partial"
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layout: "native" or "autodeco".
        linked, reflinked, copied: weight files of the base, by how they came here (in the
            `autodeco` layout they are rewritten under new names, which counts as copied).
        bytes_written: bytes really written, small files included.
        path: the merged checkpoint.
        left_out: weight files of the base that belong to no index, left out of `autodeco`.
    """

    layout: str
    linked: int
    reflinked: int
    copied: int
    bytes_written: int
    path: Path
    left_out: tuple[str, ...] = ()

    def describe(self) -> str:
        """One sentence: the layout, and how the base's weight files came here."""
        counts = {
            "hard-linked": self.linked,
            "reflinked": self.reflinked,
            "written anew" if self.layout == "autodeco" else "copied": self.copied,
        }
        how = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        text = f"{self.layout} layout, weight files: {how}; {self.bytes_written:,} bytes written"
        return text + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def merge(
    base: Path,
    heads: Path,
    output: Path,
    *,
    layout: str = "native",
    copy: bool | None = False,
    progress: Progress = silent,
) -> MergeReport:
    """Writes a checkpoint that holds the base model and the heads.

    Args:
        base: Hugging Face checkpoint directory, safetensors, sharded or one file.
        heads: anything that `load_heads` reads.
        output: directory to appear, in one step.
        layout: "native" or "autodeco".
        copy: copy the base's weight files, even where they could be linked; None: only where they
            could not. The `autodeco` layout writes them anew in any case.
        progress: shows how many bytes are written.

    Raises:
        UsageError: unknown layout, `output` exists, or it and `base` contain one another.
        WeightsError: heads or base are damaged or incomplete, or do not belong together.
        RunError: another process is merging into `output`.
        EnvironmentProblem: the output cannot be written, or the weights be neither linked nor
            reflinked there and `copy` is False.
    """
    base, heads, output = Path(base), Path(heads), Path(output)
    ready = _check(base, heads, output, layout, copy)
    tally = Tally()
    with alone_at(output), atomic_directory(output) as temporary:
        directory = _heads_directory(ready.heads, base, temporary / _SCRATCH)
        where = (base, directory, ready.config, temporary, tally)
        if layout == "native":
            _write_native(*where, copy=ready.copy, progress=progress)
        else:
            _write_autodeco(*where, ready.tensors, progress)
        if directory.parent == temporary:  # it was made for this merge
            remove(directory)
    return MergeReport(
        layout,
        tally.hardlink,
        tally.reflink,
        tally.copy,
        tally.written,
        output,
        tuple(tally.left_out),
    )


def plan_merge(
    base: Path, heads: Path, output: Path, *, layout: str = "native", copy: bool | None = False
) -> MergeReport:
    """Checks all that `merge` checks, and says what it would do; nothing is written.

    Args, Raises: as of `merge`.

    Returns:
        What the weight files would be: linked, or written in so many bytes.
    """
    base, heads, output = Path(base), Path(heads), Path(output)
    ready = _check(base, heads, output, layout, copy)
    files = {info.file for info in ready.tensors.values()}
    if layout == "native":
        files = {base / name for name in weight_files(base)}
    if layout == "native" and not ready.copy:
        return MergeReport(layout, len(files), 0, 0, 0, output)
    size = sum(file.stat().st_size for file in files)
    return MergeReport(layout, 0, 0, len(files), size, output)


@dataclass(frozen=True)
class _Ready:
    """What a merge is made of, checked."""

    config: Mapping[str, Any]
    heads: LoadedHeads
    tensors: Mapping[str, TensorInfo]
    copy: bool


def _check(base: Path, heads: Path, output: Path, layout: str, copy: bool | None) -> _Ready:
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}", fix=f"use one of {', '.join(LAYOUTS)}")
    check_places(base, output)
    config = _base_config(base)
    loaded = load_heads(heads, hidden_size=base_identity(base)["hidden_size"])
    check_fit(base, loaded.path, loaded.metadata)
    tensors = read_checkpoint(base)
    clash = [n for n in tensors if n.startswith((*HEAD_PREFIXES, BACKBONE_PREFIX))]
    if clash:
        raise WeightsError(
            f"the base already has a tensor {clash[0]}",
            where=str(base),
            fix="this is a merged checkpoint: split it first",
        )
    if copy is None:
        copy = not can_be_shared(base, output)
    require_ways(base, output, layout, copy=copy)
    return _Ready(config, loaded, tensors, copy)


def _base_config(base: Path) -> dict[str, Any]:
    if not base.is_dir():
        fix = fetch_hint(base) or "check the path"
        raise WeightsError("no such base model", where=str(base), fix=fix)
    config = read_object(base / CONFIG_FILE)
    if "autodeco" in config or config.get("model_type") == AUTODECO_MODEL_TYPE:
        raise WeightsError(
            "the base is a merged checkpoint already",
            where=str(base),
            fix="take its base out first: autodeco split --base",
        )
    return config


def _heads_directory(loaded: LoadedHeads, base: Path, scratch: Path) -> Path:
    """The heads as a heads directory: theirs where they have one, else written anew."""
    for directory in (loaded.path, loaded.path / NATIVE_DIRECTORY):
        if directory / WEIGHTS_FILE in loaded.weights and _is_heads_directory(directory):
            return directory
    known = {key: value for key, value in loaded.metadata.items() if value is not None}
    return save_heads(
        scratch, loaded.heads, metadata={**base_identity(base), **known}, dtype=loaded.dtype
    )


def _is_heads_directory(directory: Path) -> bool:
    file = directory / CONFIG_FILE
    return file.exists() and read_object(file).get("model_type") == HEADS_MODEL_TYPE


def _write_generation_config(
    base: Path, config: Mapping[str, Any], output: Path, tally: Tally
) -> dict[str, Any] | None:
    """Sampling on, the four parameters unset; returns the vendor's own values, None if no file."""
    vendor = None
    if (base / GENERATION_FILE).exists():
        generation = read_object(base / GENERATION_FILE)
        vendor = {k: generation[k] for k in (*SAMPLING_KEYS, "do_sample") if k in generation}
    else:
        # With a file there, transformers no longer takes these from config.json.
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {n: config[n] for n in names if config.get(n) is not None}
    for key in SAMPLING_KEYS:
        generation.pop(key, None)
    _write_json(output / GENERATION_FILE, {**generation, "do_sample": True}, tally)
    return vendor


def _write_json(path: Path, value: Any, tally: Tally) -> None:
    atomic_write_json(path, value)
    tally.written += path.stat().st_size


def _write_native(
    base: Path,
    heads: Path,
    config: Mapping[str, Any],
    output: Path,
    tally: Tally,
    *,
    copy: bool,
    progress: Progress,
) -> None:
    for name in model_files(base):
        if name.parts[0] == NATIVE_DIRECTORY:
            raise WeightsError(
                "the base has a directory 'autodeco'",
                where=str(base / name),
                fix="rename or remove it: the heads go there",
            )
        if name.suffix not in WEIGHT_SUFFIXES and str(name) not in (CONFIG_FILE, GENERATION_FILE):
            tally.bring_small(base / name, output / name)
    tally.bring_weights(weight_files(base), base, output, copy=copy, progress=progress)
    for name in model_files(heads):
        tally.bring_small(heads / name, output / NATIVE_DIRECTORY / name)
    vendor = _write_generation_config(base, config, output, tally)
    key = {**read_object(heads / CONFIG_FILE), "layout": "native", "generation_config": vendor}
    _write_json(output / CONFIG_FILE, {**config, "autodeco": key}, tally)


def _write_autodeco(
    base: Path,
    heads: Path,
    config: Mapping[str, Any],
    output: Path,
    tally: Tally,
    tensors: Mapping[str, TensorInfo],
    progress: Progress,
) -> None:
    old = read_index(base) if (base / INDEX).exists() else None
    table = {name: info.file.name for name, info in tensors.items()}
    if old is not None:
        table = {name: table[name] for name in old["weight_map"]}  # in the index's order
    # A lone model.safetensors would win over the index, and hide the heads.
    places = {SINGLE: RENAMED_SINGLE} if old is None else {name: name for name in table.values()}
    for name in model_files(base):
        if name.suffix in WEIGHT_SUFFIXES:
            tally.left_out += [str(name)] if str(name) not in places else []
        elif str(name) not in (CONFIG_FILE, GENERATION_FILE, INDEX):
            tally.bring_small(base / name, output / name)
    shards = [
        rename_shard(base / name, output / target, _merged_name, backbone_name)
        for name, target in places.items()
    ]
    _write_shards(shards, tally, progress)
    tally.bring_small(heads / WEIGHTS_FILE, output / PUBLISHED_FILE)
    head_names = load_heads(output / PUBLISHED_FILE).heads.state_dict()
    written = [output / target for target in (*places.values(), PUBLISHED_FILE)]
    index = {
        "metadata": {"total_size": sum(file.stat().st_size for file in written)},
        "weight_map": {_merged_name(name): places[shard] for name, shard in table.items()}
        | dict.fromkeys(head_names, PUBLISHED_FILE),
    }
    _write_json(output / INDEX, index, tally)
    vendor = _write_generation_config(base, config, output, tally)
    own = {
        **read_object(heads / CONFIG_FILE),
        "layout": "autodeco",
        "generation_config": vendor,
        "single_file": old is None,
        "index_metadata": None if old is None else old.get("metadata"),
    }
    merged = {
        **config,
        "model_type": AUTODECO_MODEL_TYPE,
        "architectures": [AUTODECO_ARCHITECTURE],
        "base_architectures": config.get("architectures"),
        "base_model_type": config.get("model_type"),
        "base_model_name_or_path": own.get("base_model_name_or_path"),
        "enable_temperature_head": own["enable_temperature_head"],
        "enable_top_p_head": own["enable_top_p_head"],
        "use_enhanced_features": own["use_enhanced_features"],
        "autodeco": own,
    }
    _write_json(output / CONFIG_FILE, merged, tally)


def _merged_name(name: str) -> str:
    return BACKBONE_PREFIX + name


def _write_shards(shards: Sequence[RenamedShard], tally: Tally, progress: Progress) -> None:
    with progress(sum(shard.size for shard in shards)) as bar:
        tally.written += sum(in_threads([shard.write for shard in shards], bar.advance))
    tally.copy += len(shards)
