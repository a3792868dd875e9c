"""Heads on disk: safetensors and a config.json; nothing is ever unpickled.

`load_heads` also takes what the published code wrote: ``autodeco_heads.safetensors`` and merged
checkpoints whose backbone stands under ``llm.``; of those only the head tensors are read.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from autodeco.errors import UsageError, WeightsError
from autodeco.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    fetch_hint,
    read_json,
    read_object,
)
from autodeco.heads.identity import CONFIG_FILE, text_config
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.shards import read_tensors
from autodeco.safetensors_header import INDEX, read_header, read_index

HEADS_MODEL_TYPE = "autodeco_heads"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
PUBLISHED_FILE = "autodeco_heads.safetensors"
NATIVE_DIRECTORY = "autodeco"
BACKBONE_PREFIX = "llm."
HEAD_PREFIXES = ("temp_head.", "top_p_head.")
_AGAIN = "export or fetch the heads again"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What merging adds to the metadata.
MERGE_KEYS = ("layout", "generation_config", "single_file", "index_metadata")


@dataclass(frozen=True)
class LoadedHeads:
    """Heads read from disk.

    Attributes:
        heads: the modules, float32, on the CPU.
        metadata: base model, sizes, objective, `temperature_scale`, `top_p_scale`, versions.
        path: the directory or file that was asked for.
        weights: the files that hold the tensors, each with the names read from it.
        dtype: the stored dtype ("float32", "bfloat16" or "float16").
    """

    heads: DecodingHeads
    metadata: Mapping[str, Any]
    path: Path
    weights: Mapping[Path, tuple[str, ...]]
    dtype: str


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("autodeco", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "source tree"
    return found


def heads_config_json(heads: DecodingHeads, metadata: Mapping[str, Any], dtype: str) -> Any:
    """The config.json of a heads directory."""
    shape = heads.config
    return {
        "base_model_name_or_path": None,
        "base_model_type": None,
        "vocab_size": None,
        "base_config_sha256": None,
        "objective": None,
        "temperature_scale": 1.0,
        "top_p_scale": 1.0,
        "versions": _versions(),
        **metadata,
        "model_type": HEADS_MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "hidden_size": shape.hidden_size,
        "heads": shape.heads,
        "enhanced_features": shape.enhanced_features,
        "intermediate_size": shape.intermediate_size,
        "enable_temperature_head": heads.temp_head is not None,
        "enable_top_p_head": heads.top_p_head is not None,
        "use_enhanced_features": shape.enhanced_features,
        "dtype": dtype,
    }


def save_heads(
    directory: Path,
    heads: DecodingHeads,
    *,
    metadata: Mapping[str, Any],
    dtype: str = "float32",
    replace: bool = False,
) -> Path:
    """Writes a heads directory: config.json and model.safetensors, in one step.

    Args:
        directory: to appear; it must not exist unless `replace`.
        heads: what to write.
        metadata: further keys of config.json (base model, objective, scales, ...); see
            `base_identity`. Keys that describe the heads themselves cannot be overridden.
        dtype: of the stored tensors: "float32", "bfloat16" or "float16".
        replace: put it in the place of an existing directory.

    Returns:
        `directory`.

    Raises:
        UsageError: unknown dtype.
        WeightsError: a value is not finite (in the stored dtype).
        EnvironmentProblem: it cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in heads.state_dict().items()
    }
    for name, tensor in tensors.items():
        _check_finite(name, tensor, directory)
    with atomic_directory(directory, replace=replace) as temporary:
        atomic_write_bytes(
            temporary / WEIGHTS_FILE, bytes(serialize(tensors, metadata={"format": "pt"}))
        )
        atomic_write_json(temporary / CONFIG_FILE, heads_config_json(heads, metadata, dtype))
    return directory


def load_heads(path: Path, *, hidden_size: int | None = None) -> LoadedHeads:
    """Reads heads from any of the places that they live in.

    Args:
        path: a heads directory; a ``.safetensors`` file; a directory with the published
            ``autodeco_heads.safetensors``; a merged checkpoint of either layout.
        hidden_size: of the base, where one is at hand: a top-p head alone does not tell its own.

    Raises:
        WeightsError: nothing there, or a tensor is missing, unknown, of a wrong shape or dtype,
            or not finite; or config.json disagrees with the tensors.
    """
    path = Path(path)
    sources, config = _locate(path)
    tensors: dict[str, Tensor] = {}
    for file, names in sources.items():
        tensors.update(read_tensors(file, names))
    shape = _infer(tensors, path, hidden_size)
    _compare(shape, config, path)
    heads = DecodingHeads(shape)
    _fill(heads, tensors, path)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    metadata = heads_config_json(heads, _known(config), dtype)
    return LoadedHeads(heads.requires_grad_(False), metadata, path, sources, dtype)


def heads_from(
    tensors: Mapping[str, Tensor], path: Path, *, hidden_size: int | None = None
) -> DecodingHeads:
    """Makes heads of tensors under their published names.

    Args:
        tensors: name -> tensor, in one of `DTYPES`.
        path: where they are from, for errors.
        hidden_size: of the base, where one is at hand: a top-p head alone does not tell its own.

    Raises:
        WeightsError: a tensor is missing, unknown, of a wrong shape or dtype, or not finite.
    """
    heads = DecodingHeads(_infer(tensors, path, hidden_size))
    _fill(heads, tensors, path)
    return heads.requires_grad_(False)


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata in a config: all of a heads directory's, the published keys of a model's."""
    if config.get("model_type") == HEADS_MODEL_TYPE:
        return dict(config)
    if isinstance(config.get("autodeco"), Mapping):  # a merged directory of ours
        return {k: v for k, v in config["autodeco"].items() if k not in MERGE_KEYS}
    base = ("base_model_name_or_path", "base_model_type", "vocab_size")
    keys = (*base, "temperature_scale", "top_p_scale")
    return {key: config[key] for key in keys if key in config}


def _locate(path: Path) -> tuple[dict[Path, tuple[str, ...]], Mapping[str, Any]]:
    """Finds the files with head tensors, and the config beside them."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(
                "heads are read from safetensors only", where=str(path), fix="convert the file"
            )
        return {path: _head_names(path)}, {}
    if not path.is_dir():
        fix = fetch_hint(path) or "check the path"
        raise WeightsError("no such heads", where=str(path), fix=fix)
    config: Mapping[str, Any] = {}
    if (path / CONFIG_FILE).exists():
        found = read_json(path / CONFIG_FILE)
        if not isinstance(found, Mapping):
            raise WeightsError(
                "config.json holds no object",
                where=str(path / CONFIG_FILE),
                fix="use the config.json that came with the heads",
            )
        config = found
    if config.get("model_type") == HEADS_MODEL_TYPE:
        if config.get("format_version", 1) != FORMAT_VERSION:
            raise WeightsError(
                f"heads of format {config['format_version']!r}; {FORMAT_VERSION} is known here",
                where=str(path / CONFIG_FILE),
                fix="update autodeco",
            )
        return {path / WEIGHTS_FILE: _head_names(path / WEIGHTS_FILE)}, config
    if (path / NATIVE_DIRECTORY / CONFIG_FILE).exists():
        return _locate(path / NATIVE_DIRECTORY)
    if (path / PUBLISHED_FILE).exists():
        return {path / PUBLISHED_FILE: _head_names(path / PUBLISHED_FILE)}, config
    if (path / INDEX).exists():
        sources: dict[Path, tuple[str, ...]] = {}
        for name, shard in read_index(path)["weight_map"].items():
            if name.startswith(HEAD_PREFIXES):
                sources[path / shard] = (*sources.get(path / shard, ()), name)
        if sources:
            return sources, config
    elif (path / WEIGHTS_FILE).exists():
        return {path / WEIGHTS_FILE: _head_names(path / WEIGHTS_FILE)}, config
    raise WeightsError(
        "no heads in this directory",
        where=str(path),
        fix=f"give a heads directory, a merged checkpoint, or one with {PUBLISHED_FILE}",
    )


def _head_names(file: Path) -> tuple[str, ...]:
    names = tuple(read_header(file))
    heads = tuple(name for name in names if name.startswith(HEAD_PREFIXES))
    foreign = [n for n in names if n not in heads and not n.startswith(BACKBONE_PREFIX)]
    if not heads or foreign:
        raise WeightsError(
            f"unknown tensor {foreign[0]}" if heads else "no heads in this file",
            where=str(file),
            fix="heads are named temp_head.mlp.{0,2}.* and top_p_head.mlp.{0,2}.*",
        )
    return heads


def _infer(tensors: Mapping[str, Tensor], path: Path, base: int | None) -> HeadsConfig:
    """The shape of the heads, read off the tensors' shapes (and the base's hidden size)."""
    temperature, top_p = (tensors.get(f"{head}mlp.0.weight") for head in HEAD_PREFIXES)
    for head, weight in zip(HEAD_PREFIXES, (temperature, top_p), strict=True):
        present = [name for name in tensors if name.startswith(head)]
        if weight is None and present:
            raise WeightsError(f"tensor {head}mlp.0.weight is missing", where=str(path), fix=_AGAIN)
        if weight is not None and weight.ndim != 2:
            raise WeightsError(
                f"tensor {head}mlp.0.weight has shape {list(weight.shape)}, a matrix is expected",
                where=str(path),
                fix=_AGAIN,
            )
    first = temperature if temperature is not None else top_p
    if first is None:
        raise WeightsError("no head tensors", where=str(path), fix=_AGAIN)
    width = first.shape[0]
    if temperature is None:
        # Without the temperature head d is not in the file: an odd surplus of 1 or 5 tells.
        size = first.shape[1]
        d, enhanced = (size - 5, True) if (size - 5) % 2 == 0 and size > 5 else (size - 1, False)
        if base in (size - 5, size - 1):
            d, enhanced = base, base == size - 5
        else:
            d, enhanced = _ambiguous(size, path, (d, enhanced))
        return HeadsConfig(d, "top-p", enhanced, width)
    d = temperature.shape[1]
    if top_p is None:
        return HeadsConfig(d, "temperature", True, width)
    surplus = top_p.shape[1] - d
    if surplus not in (1, 5):
        raise WeightsError(
            f"tensor top_p_head.mlp.0.weight has {top_p.shape[1]} inputs; "
            f"{d + 5} (with features) or {d + 1} are expected",
            where=str(path),
            fix=_AGAIN,
        )
    return HeadsConfig(d, "both", surplus == 5, width)


def _ambiguous(size: int, path: Path, guess: tuple[int, bool]) -> tuple[int, bool]:
    """Lets config.json decide between d = size - 5 and d = size - 1, where there is one."""
    if path.is_dir():
        for directory in (path, path / NATIVE_DIRECTORY):
            if (directory / CONFIG_FILE).exists():
                config = read_object(directory / CONFIG_FILE)
                d = text_config(config).get("hidden_size")
                if d in (size - 5, size - 1):
                    return int(d), d == size - 5
    return guess


def _compare(shape: HeadsConfig, config: Mapping[str, Any], path: Path) -> None:
    """What config.json says must be what the tensors are."""
    inner = text_config(config)
    claims = {
        "hidden_size": (inner.get("hidden_size"), shape.hidden_size),
        "enable_temperature_head": (
            config.get("enable_temperature_head"),
            shape.heads != "top-p",
        ),
        "enable_top_p_head": (config.get("enable_top_p_head"), shape.heads != "temperature"),
    }
    if shape.heads != "temperature":
        claims["use_enhanced_features"] = (
            config.get("use_enhanced_features"),
            shape.enhanced_features,
        )
    for key, (claimed, real) in claims.items():
        if claimed is not None and claimed != real:
            raise WeightsError(
                f"config.json says {key} = {claimed!r}, the tensors say {real!r}",
                where=str(path),
                fix="the two do not belong together: export the heads again",
            )


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(
            f"tensor {name} has values that are not finite", where=str(path), fix="train again"
        )


def _fill(heads: DecodingHeads, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = heads.state_dict()
    for name in sorted(set(wanted) | set(tensors)):
        if name not in tensors or name not in wanted:
            verdict = "missing" if name not in tensors else "unknown"
            raise WeightsError(f"tensor {name} is {verdict}", where=str(path), fix=_AGAIN)
        if tensors[name].shape != wanted[name].shape:
            raise WeightsError(
                f"tensor {name} has shape {list(tensors[name].shape)}, "
                f"{list(wanted[name].shape)} is expected",
                where=str(path),
                fix=_AGAIN,
            )
        if tensors[name].dtype not in DTYPES.values():
            raise WeightsError(
                f"tensor {name} has dtype {tensors[name].dtype}; use {', '.join(DTYPES)}",
                where=str(path),
                fix="store the heads in one of these dtypes",
            )
        _check_finite(name, tensors[name], path)
    heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
