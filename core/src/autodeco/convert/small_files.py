"""The files of a checkpoint that are no weights: config, tokenizer, chat template, remote code."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from autodeco.files import make_directory, write_problem
from autodeco.heads.places import WEIGHT_SUFFIXES, model_files
from autodeco.safetensors_header import INDEX


def small_files(checkpoint: Path) -> tuple[Path, ...]:
    """Returns all files but the weights and their index, relative to the checkpoint."""
    files = model_files(checkpoint)
    return tuple(f for f in files if f.suffix not in WEIGHT_SUFFIXES and str(f) != INDEX)


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copies files into another directory, which is made.

    Args:
        files: Relative to `source`.
        source: Where they are.
        target: Where they go.

    Raises:
        EnvironmentProblem: One cannot be read or written.
    """
    make_directory(target)
    for file in files:
        make_directory((target / file).parent)
        try:
            shutil.copyfile(source / file, target / file)
        except OSError as error:
            raise write_problem(error, target / file, "copy") from error
