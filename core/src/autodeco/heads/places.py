"""Files of a checkpoint directory: which there are, and bringing them into another."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from autodeco.errors import UsageError, WeightsError
from autodeco.files import PARTIAL_SUFFIX, link_or_copy, read_json

GENERATION_FILE = "generation_config.json"
AUTODECO_MODEL_TYPE = "autodeco"
RENAMED_SINGLE = "model-00001-of-00002.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_NO_PART_OF_A_MODEL = (".git", ".cache", "__pycache__")


@dataclass
class Tally:
    hardlink: int = 0
    reflink: int = 0
    copy: int = 0
    written: int = 0
    left_out: list[str] = field(default_factory=list)

    def bring(self, source: Path, target: Path, *, copy: bool) -> None:
        """Brings a file over; weight files share their blocks with the base if they can."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix not in WEIGHT_SUFFIXES:
            # An edit of a small file in the merged directory must not change the base.
            shutil.copyfile(source, target)
            self.written += target.stat().st_size
            return
        how = "copy" if copy else link_or_copy(source, target)
        if copy:
            shutil.copyfile(source, target)
        setattr(self, how, getattr(self, how) + 1)
        if how == "copy":
            self.written += target.stat().st_size


def is_merged(model: Path) -> bool:
    """Whether a directory is a merged checkpoint, of either layout, ours or the published one."""
    file = model / "config.json"
    config = read_json(file) if file.is_file() else None
    return isinstance(config, dict) and (
        "autodeco" in config or config.get("model_type") == AUTODECO_MODEL_TYPE
    )


def check_places(base: Path, output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UsageError(
            "the output exists already", where=str(output), fix="choose another, or remove it"
        )
    inside, outside = output.resolve(), base.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UsageError(
            "output and base lie within one another",
            where=str(output),
            fix="choose an output beside the base",
        )


def model_files(base: Path) -> list[Path]:
    """Every file of the base, relative to it."""
    found: list[Path] = []
    for root, directories, names in os.walk(base):
        directories[:] = sorted(d for d in directories if d not in _NO_PART_OF_A_MODEL)
        for directory in directories:
            if Path(root, directory).is_symlink():
                raise WeightsError(
                    "a symbolic link to a directory lies in the base",
                    where=str(Path(root, directory)),
                    fix="put the directory itself there, or remove the link",
                )
        for name in sorted(names):
            path = Path(root, name)
            if name.endswith(PARTIAL_SUFFIX):
                continue
            if not path.exists():
                raise WeightsError("the link leads nowhere", where=str(path), fix="fetch it again")
            found.append(path.relative_to(base))
    return found
