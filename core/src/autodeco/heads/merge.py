"""Merge heads into a checkpoint, and split them off again; no base tensor is ever cast.

Two layouts (docs: "The heads on disk"): `native`, which any tool loads as the base model, and
`autodeco`, the layout of the published models, with the backbone under ``llm.``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import UsageError, WeightsError
from autodeco.files import (
    PARTIAL_SUFFIX,
    atomic_directory,
    atomic_write_json,
    read_json,
)
from autodeco.heads.files import (
    BACKBONE_PREFIX,
    CONFIG_FILE,
    HEAD_PREFIXES,
    HEADS_MODEL_TYPE,
    NATIVE_DIRECTORY,
    PUBLISHED_FILE,
    WEIGHTS_FILE,
    LoadedHeads,
    base_identity,
    load_heads,
    save_heads,
)
from autodeco.heads.places import (
    AUTODECO_MODEL_TYPE,
    GENERATION_FILE,
    RENAMED_SINGLE,
    WEIGHT_SUFFIXES,
    Tally,
    check_places,
    model_files,
)
from autodeco.heads.shards import INDEX_FILE, rename_tensors, weight_shards
from autodeco.heads.split import split

__all__ = ["LAYOUTS", "MergeReport", "merge", "split"]

LAYOUTS = ("native", "autodeco")
AUTODECO_ARCHITECTURE = "AutoDecoModelForCausalLM"
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
    base: Path, heads: Path, output: Path, *, layout: str = "native", copy: bool = False
) -> MergeReport:
    """Writes a checkpoint that holds the base model and the heads.

    Args:
        base: Hugging Face checkpoint directory, safetensors, sharded or one file.
        heads: anything that `load_heads` reads.
        output: directory to appear, in one step.
        layout: "native" or "autodeco".
        copy: copy the base's weight files even where they could be hard-linked.

    Raises:
        UsageError: unknown layout, `output` exists, or it and `base` contain one another.
        WeightsError: heads or base are damaged or incomplete, or do not belong together.
        EnvironmentProblem: the output cannot be written.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}", fix=f"use one of {', '.join(LAYOUTS)}")
    base, heads, output = Path(base), Path(heads), Path(output)
    check_places(base, output)
    config = _base_config(base)
    loaded = load_heads(heads, hidden_size=base_identity(base)["hidden_size"])
    _check_fit(base, loaded)
    table, single = weight_shards(base)
    clash = [n for n in table if n.startswith((*HEAD_PREFIXES, BACKBONE_PREFIX))]
    if clash:
        raise WeightsError(
            f"the base already has a tensor {clash[0]}",
            where=str(base),
            fix="this is a merged checkpoint: split it first",
        )
    tally = Tally()
    with (
        atomic_directory(output) as temporary,
        tempfile.TemporaryDirectory(
            prefix=".heads.", suffix=PARTIAL_SUFFIX, dir=output.parent
        ) as scratch,
    ):
        directory = _heads_directory(loaded, base, Path(scratch) / "heads")
        if layout == "native":
            _write_native(base, directory, config, temporary, tally, copy=copy)
        else:
            _write_autodeco(base, directory, config, temporary, tally, table, single=single)
    return MergeReport(
        layout,
        tally.hardlink,
        tally.reflink,
        tally.copy,
        tally.written,
        output,
        tuple(tally.left_out),
    )


def _base_config(base: Path) -> dict[str, Any]:
    if not base.is_dir():
        raise WeightsError("no such base model", where=str(base), fix="check the path")
    config = read_json(base / CONFIG_FILE)
    if not isinstance(config, dict):
        raise WeightsError(
            "config.json holds no object",
            where=str(base / CONFIG_FILE),
            fix="use the config.json that came with the checkpoint",
        )
    if "autodeco" in config or config.get("model_type") == AUTODECO_MODEL_TYPE:
        raise WeightsError(
            "the base is a merged checkpoint already",
            where=str(base),
            fix="take its base out first: autodeco split --base",
        )
    return config


def _check_fit(base: Path, loaded: LoadedHeads) -> None:
    identity, made_for = base_identity(base), loaded.metadata
    for key in ("hidden_size", "base_model_type", "base_config_sha256"):
        if made_for.get(key) is not None and made_for[key] != identity[key]:
            raise WeightsError(
                f"these heads were made for another model: {key} is {made_for[key]!r} there, "
                f"{identity[key]!r} in the base",
                where=f"{loaded.path} and {base}",
                fix=f"merge them with {made_for.get('base_model_name_or_path') or 'their base'}",
            )


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
    return file.exists() and read_json(file).get("model_type") == HEADS_MODEL_TYPE


def _write_generation_config(
    base: Path, config: Mapping[str, Any], output: Path, tally: Tally
) -> dict[str, Any] | None:
    """Sampling on, the four parameters unset; returns the vendor's own values, None if no file."""
    vendor = None
    if (base / GENERATION_FILE).exists():
        generation = dict(read_json(base / GENERATION_FILE))
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
) -> None:
    for name in model_files(base):
        if str(name) in (CONFIG_FILE, GENERATION_FILE):
            continue
        if name.parts[0] == NATIVE_DIRECTORY:
            raise WeightsError(
                "the base has a directory 'autodeco'",
                where=str(base / name),
                fix="rename or remove it: the heads go there",
            )
        tally.bring(base / name, output / name, copy=copy)
    for name in model_files(heads):
        target = output / NATIVE_DIRECTORY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(heads / name, target)
        tally.written += target.stat().st_size
    vendor = _write_generation_config(base, config, output, tally)
    key = {**read_json(heads / CONFIG_FILE), "layout": "native", "generation_config": vendor}
    _write_json(output / CONFIG_FILE, {**config, "autodeco": key}, tally)


def _write_autodeco(
    base: Path,
    heads: Path,
    config: Mapping[str, Any],
    output: Path,
    tally: Tally,
    table: Mapping[str, str],
    *,
    single: bool,
) -> None:
    shards = set(table.values())
    for name in model_files(base):
        if str(name) in shards:
            # A lone model.safetensors would win over the index, and hide the heads.
            target = output / (RENAMED_SINGLE if single else name)
            tally.written += rename_tensors(base / name, target, lambda n: BACKBONE_PREFIX + n)
            tally.copy += 1
        elif name.suffix in WEIGHT_SUFFIXES:
            tally.left_out.append(str(name))
        elif str(name) not in (CONFIG_FILE, GENERATION_FILE, INDEX_FILE):
            tally.bring(base / name, output / name, copy=True)
    shutil.copyfile(heads / WEIGHTS_FILE, output / PUBLISHED_FILE)
    tally.written += (output / PUBLISHED_FILE).stat().st_size
    names = {BACKBONE_PREFIX + n: RENAMED_SINGLE if single else s for n, s in table.items()}
    head_names = dict.fromkeys(
        load_heads(output / PUBLISHED_FILE).heads.state_dict(), PUBLISHED_FILE
    )
    size = sum((output / s).stat().st_size for s in {*names.values(), PUBLISHED_FILE})
    index = {"metadata": {"total_size": size}, "weight_map": {**names, **head_names}}
    _write_json(output / INDEX_FILE, index, tally)
    vendor = _write_generation_config(base, config, output, tally)
    own = read_json(heads / CONFIG_FILE)
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
        "autodeco": {
            **own,
            "layout": "autodeco",
            "generation_config": vendor,
            "single_file": single,
        },
    }
    _write_json(output / CONFIG_FILE, merged, tally)
