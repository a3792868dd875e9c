"""Writes a checkpoint with random weights, for tests and dry runs of any family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from autodeco.errors import EnvironmentProblem
from autodeco.family import FamilySpec, ModelPreset
from autodeco.files import atomic_directory

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

    Vectors (norms) are drawn around 1, matrices around 0 with a variance of 1 / columns, so that
    hidden states keep their scale and every parameter matters.

    Args:
        family: The plugin's data.
        preset: Its shape is used.
        directory: Appears in one step.
        tokenizer: Its tokenizer files are copied along.
        seed: Of the draw.
        dtype: Of the tensors.

    Raises:
        EnvironmentProblem: The directory exists or cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for rule in family.weight_map.expand(preset.shape):
        for name, size in zip(rule.sources, rule.source_sizes, strict=True):
            noise = torch.randn(size, generator=generator)
            value = 1 + 0.2 * noise if len(size) == 1 else noise * size[-1] ** -0.5
            tensors[name] = value.to(dtype)
    config = family.architecture(preset.architecture).config_json(preset.shape)
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
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory
