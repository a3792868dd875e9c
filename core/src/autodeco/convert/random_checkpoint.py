"""Writes a checkpoint with random weights, for tests and dry runs of any family."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from autodeco.convert.shards import named_function
from autodeco.convert.story_tokenizer import write_story_tokenizer
from autodeco.errors import EnvironmentProblem, PluginError
from autodeco.family import Architecture, FamilySpec, ModelPreset
from autodeco.files import atomic_directory
from autodeco.storage import BUILT_IN, StorageFormat
from autodeco.weights import source_sizes

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "generation_config*")


def write_random_checkpoint(
    family: FamilySpec,
    preset: ModelPreset,
    directory: Path,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Draws every tensor that the weight map reads from a non-degenerate distribution.

    Norms are drawn around 1, biases and other vectors around 0, matrices around 0 with a variance
    of 1 / inputs, so that hidden states keep their scale and every parameter matters. What the
    architecture says is stored in parts is stored in parts.

    Args:
        family: The plugin's data.
        preset: Its shape is used.
        directory: Appears in one step.
        tokenizer: Its tokenizer files are copied along; by default a preset whose task is the
            stories gets theirs.
        seed: Of the draw.
        dtype: Of the tensors.

    Raises:
        EnvironmentProblem: The directory exists or cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    architecture = family.architecture(preset.architecture)
    rules = family.weight_map.expand(preset.shape)
    sizes = source_sizes(rules)
    for rule in rules:
        for part in rule.parts:
            if sizes.get(part.source) is None:
                continue
            noise = torch.randn(sizes.pop(part.source), generator=generator)
            if len(part.size) == 1:
                value = 1 + 0.2 * noise if "norm" in rule.target else 0.3 * noise
            else:
                value = noise * part.size[-1] ** -0.5
            tensors |= stored(architecture, family.formats, part.source, value, dtype)
    config = architecture.config_json(preset.shape, preset.config)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    with atomic_directory(directory) as temporary:
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # it hides the system's error
            raise EnvironmentProblem(
                f"cannot write: {error}",
                where=str(directory),
                fix="free some space, or choose another directory with --out; then run again",
            ) from error
        if tokenizer is not None:
            for pattern in _TOKENIZER_FILES:
                for path in tokenizer.glob(pattern):
                    shutil.copyfile(path, temporary / path.name)
            original = json.loads((tokenizer / "config.json").read_text())
            config |= {k: v for k, v in original.items() if k.endswith("_token_id")}
        elif preset.task == "stories":
            config |= write_story_tokenizer(temporary, preset.shape.vocab_size)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def stored(
    architecture: Architecture,
    formats: Sequence[StorageFormat],
    name: str,
    value: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Returns a float32 tensor as published checkpoints store it: one tensor, or several parts.

    Args:
        architecture: Says which tensors are stored in parts.
        formats: The family's own storage formats.
        name: The tensor's.
        value: The tensor.
        dtype: Of what is stored as it is.

    Raises:
        PluginError: The architecture names a storage format that there is not.
    """
    known = {one.name: one for one in (*formats, *BUILT_IN)}
    for pattern, wanted in architecture.stored.items():
        if not re.fullmatch(pattern, name):
            continue
        if wanted in _DTYPES:
            return {name: value.to(_DTYPES[wanted])}
        if wanted not in known:
            raise PluginError(
                f"{architecture.name} stores {pattern!r} as {wanted!r}, which is no storage format",
                fix="use one of " + ", ".join((*_DTYPES, *known)),
            )
        how = known[wanted]
        parts = named_function(how.encode, how.name)(value)
        return {name + how.parts[part].suffix: tensor for part, tensor in parts.items()}
    return {name: value.to(dtype)}
