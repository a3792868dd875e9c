"""Files of a checkpoint directory: which there are, and bringing them into another."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autodeco.copying import copy_file, nothing, require_sharing, share_file
from autodeco.disk_space import require_space
from autodeco.errors import EnvironmentProblem, UsageError, WeightsError
from autodeco.files import PARTIAL_SUFFIX, make_directory, read_json, remove
from autodeco.heads.identity import AUTODECO_MODEL_TYPE
from autodeco.lock import file_lock
from autodeco.safetensors_header import INDEX, SINGLE, read_index

GENERATION_FILE = "generation_config.json"
RENAMED_SINGLE = "model-00001-of-00002.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_NO_PART_OF_A_MODEL = (".git", ".cache", "__pycache__")
_NOT_LINKED = (
    "add --copy to copy them, or choose an output on the filesystem of the base "
    "(in a run, --merge none leaves the merge out)"
)


class Bar(Protocol):
    """Shows how far something is."""

    def advance(self, size: int) -> None:
        """Counts `size` more bytes."""
        ...


#: Makes a bar for a number of bytes.
Progress = Callable[[int], AbstractContextManager[Bar]]


class _Silent:
    def advance(self, size: int) -> None:
        nothing(size)


def silent(total: int) -> AbstractContextManager[Bar]:
    """The bar that shows nothing."""
    return contextlib.nullcontext(_Silent())


@dataclass
class Tally:
    """How the weight files came over.

    Attributes:
        hardlink, reflink, copy: How many, by way.
        written: Bytes really written.
        left_out: Weight files that were left out.
    """

    hardlink: int = 0
    reflink: int = 0
    copy: int = 0
    written: int = 0
    left_out: list[str] = field(default_factory=list)

    def bring_small(self, source: Path, target: Path) -> None:
        """Copies a file that holds no weights: an edit of it must not change the base."""
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        self.written += target.stat().st_size

    def bring_weights(
        self, files: list[Path], base: Path, output: Path, *, copy: bool, progress: Progress
    ) -> None:
        """Brings weight files over; they share their blocks with the base unless `copy`.

        Raises:
            EnvironmentProblem: They cannot be shared, or not be written.
        """
        total = sum((base / name).stat().st_size for name in files) if copy else 0
        with progress(total) as bar:
            for name in files:
                source, target = base / name, output / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if copy:
                    self.written += copy_file(source, target, bar.advance)
                    self.copy += 1
                    continue
                how = share_file(source, target)
                if how is None:
                    raise EnvironmentProblem(
                        "the file can neither be hard-linked nor reflinked",
                        where=f"{source} to {target.parent}",
                        fix=_NOT_LINKED,
                    )
                setattr(self, how, getattr(self, how) + 1)


def is_merged(model: Path) -> bool:
    """Whether a directory is a merged checkpoint, of either layout, ours or the published one."""
    file = model / "config.json"
    config = read_json(file) if file.is_file() else None
    return isinstance(config, dict) and (
        "autodeco" in config or config.get("model_type") == AUTODECO_MODEL_TYPE
    )


def check_places(base: Path, output: Path) -> None:
    """Checks that an output can be written beside a base.

    Raises:
        UsageError: It exists, or one of the two lies within the other.
    """
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


def require_ways(base: Path, output: Path, layout: str, *, copy: bool) -> None:
    """Checks, before anything else is done, that the weights of a base can come to an output.

    Args:
        base: The base checkpoint.
        output: The merged one; it need not exist yet.
        layout: ``native``, of which the weight files are shared, or copied; else they are
            written anew.
        copy: Whether they are copied.

    Raises:
        EnvironmentProblem: They cannot be shared and `copy` was not asked for, or there is no room
            for them.
        WeightsError: The base is incomplete.
    """
    if layout == "native" and not copy:
        require_sharing(map(base.joinpath, weight_files(base)), output, _NOT_LINKED)
        return
    if layout == "native":
        names = {str(name) for name in weight_files(base)}
    elif (base / INDEX).exists():
        names = set(read_index(base)["weight_map"].values())
    else:
        names = {SINGLE} if (base / SINGLE).exists() else set()
    present = [base / name for name in names if (base / name).exists()]
    require_space(output, sum(file.stat().st_size for file in present), "the merged checkpoint")


def can_be_shared(base: Path, output: Path) -> bool:
    """Whether the weight files of a base can be linked or reflinked to where an output goes."""
    try:
        require_ways(base, output, "native", copy=False)
    except EnvironmentProblem:
        return False
    return True


def weight_files(base: Path) -> list[Path]:
    """The files of the base that hold weights, relative to it."""
    return [name for name in model_files(base) if name.suffix in WEIGHT_SUFFIXES]


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


@contextlib.contextmanager
def alone_at(*outputs: Path) -> Iterator[None]:
    """Keeps other processes from writing the same outputs, and clears what killed ones left there.

    Raises:
        RunError: Another process is writing one of them.
        EnvironmentProblem: The lock cannot be taken, or what was left not be removed.
    """
    with contextlib.ExitStack() as stack:
        for output in outputs:
            make_directory(output.parent)
            name = f".{output.name}.lock"
            lock = file_lock(
                output.with_name(name), "the output", output, "wait for it, or choose another"
            )
            stack.callback(lock.remove)
            for left in output.parent.glob(f".{glob.escape(output.name)}.????????{PARTIAL_SUFFIX}"):
                remove(left)
        yield
