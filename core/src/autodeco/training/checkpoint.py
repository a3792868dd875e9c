"""Checkpoints of a training run: heads, optimizer, position; written whole or not at all.

``<model>-<step>-<samples>/`` is itself a heads directory, so it can be exported, merged or served.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from autodeco.errors import RunError, WeightsError
from autodeco.files import (
    PARTIAL_SUFFIX,
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    read_json,
    write_problem,
)
from autodeco.heads.files import heads_config_json
from autodeco.heads.modules import DecodingHeads

_NAME = re.compile(r".+-(\d+)-(\d+)")
HEADS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
CONFIG = "config.json"
STATE = "state.json"
_FIX = "choose another with --checkpoint STEP, or train again: training takes the one before"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after a step; with the tensors beside it, all that resuming needs.

    Attributes:
        step: Steps done; the data position follows from it, and all random draws are functions of
            the seed and the position, so there is no random state to keep.
        samples: Samples seen.
        optimizer_steps: Steps that had a kept token and moved the heads.
        total_steps: Length of the schedule.
        seed: Of every draw.
        job_hash: Of the job.
        best_step: The step with the lowest held-out loss of the objective so far.
        best_loss: That loss; None before the first measurement.
        metrics: The last held-out measurement.
    """

    step: int
    samples: int
    optimizer_steps: int
    total_steps: int
    seed: int
    job_hash: str
    best_step: int
    best_loss: float | None
    metrics: Mapping[str, float]


Loaded = tuple[dict[str, Tensor], dict[str, Tensor], TrainingState]


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint's name, -1 if it has none."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(directory: Path) -> list[Path]:
    """Returns the complete checkpoints below `directory`, oldest first."""
    found = (p for p in directory.glob("*") if not p.name.startswith(".") and p.is_dir())
    return sorted((p for p in found if step_of(p) >= 0), key=step_of)


def save_checkpoint(
    directory: Path,
    model_name: str,
    heads: DecodingHeads,
    moments: Mapping[str, Tensor],
    state: TrainingState,
    metadata: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint; it appears in one step.

    Args:
        directory: ``checkpoints`` of the run.
        model_name: First part of its name.
        heads: The heads, float32.
        moments: The optimizer's tensors, float32.
        state: Where the run stands.
        metadata: Recorded in the heads' config.json.

    Raises:
        EnvironmentProblem: It cannot be written; older checkpoints are intact.
    """
    final = directory / f"{model_name}-{state.step}-{state.samples}"
    tensors = {name: t.detach().cpu().contiguous() for name, t in heads.state_dict().items()}
    files = {
        HEADS: save(tensors, metadata={"format": "pt"}),
        OPTIMIZER: save({name: t.detach().cpu().contiguous() for name, t in moments.items()}),
    }
    config = json.dumps(heads_config_json(heads, metadata, "float32"), indent=2, default=str)
    files[CONFIG] = config.encode() + b"\n"
    with atomic_directory(final, replace=True) as temporary:
        for name, data in files.items():
            atomic_write_bytes(temporary / name, data)
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        content = {**asdict(state), "sha256": hashes}
        atomic_write_json(temporary / STATE, {**content, "own_sha256": _digest(content)})
    return final


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_state(path: Path) -> TrainingState:
    """Verifies a checkpoint, every byte of it, and returns where it stands.

    Raises:
        WeightsError: It is torn: a file is missing, cut short or changed.
    """
    try:
        return _verified(path)
    except WeightsError as error:
        raise WeightsError(error.what, where=error.where, fix=_FIX) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the checkpoint is torn: {error}", where=str(path), fix=_FIX) from error


def _verified(path: Path) -> TrainingState:
    content = dict(read_json(path / STATE))
    if content.pop("own_sha256") != _digest(content):
        raise WeightsError(
            "the file is damaged",
            where=str(path / STATE),
            fix=_FIX,
        )
    hashes = content.pop("sha256")
    for name in (HEADS, OPTIMIZER, CONFIG):
        with (path / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != hashes[name]:
                raise WeightsError(
                    f"{name} is damaged",
                    where=str(path / name),
                    fix=_FIX,
                )
    return TrainingState(**content)


def load_checkpoint(path: Path) -> Loaded:
    """Reads a checkpoint: heads, optimizer tensors, state.

    Raises:
        WeightsError: It is torn: a file is missing, cut short or changed.
    """
    state = load_state(path)
    try:
        return load_file(path / HEADS), load_file(path / OPTIMIZER), state
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the checkpoint is torn: {error}", where=str(path), fix=_FIX) from error


def load_into(heads: DecodingHeads, path: Path) -> None:
    """Gives heads the tensors of a checkpoint.

    Args:
        heads: As they were made for the training.
        path: The checkpoint.

    Raises:
        WeightsError: It is torn, holds other heads, or a value is not finite.
    """
    tensors, _, _ = load_checkpoint(path)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise WeightsError(
                f"tensor {name} has values that are not finite", where=str(path), fix=_FIX
            )
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(
            "the checkpoint is of other heads than the job asks for",
            where=str(path),
            fix="choose --heads and --enhanced-features as the training had them",
        ) from error
    heads.requires_grad_(False)


def load_newest(directory: Path, warn: Callable[[str], None]) -> Loaded | None:
    """Reads the newest checkpoint that is whole.

    Torn ones are named aloud and set aside as ``<name>.torn``, so that they neither count among
    those to keep nor are mistaken for the last one.

    Raises:
        EnvironmentProblem: A torn checkpoint cannot be renamed.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except WeightsError as error:
            aside = path.with_name(f"{path.name}.torn")
            shutil.rmtree(aside, ignore_errors=True)
            _rename(path, aside)
            what = f"checkpoint {path.name} cannot be used ({error.what}); it is now {aside.name}"
            last = path == paths[0]
            warn(f"{what}; " + ("training starts again" if last else "trying the one before"))
    return None


def _rename(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as error:
        raise write_problem(error, path, "rename the checkpoint") from error


def remove_old(directory: Path, keep: int, best_step: int) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and the best; returns what was removed.

    They lose their names at once; a file that cannot be deleted is left to the next start, so that
    a reader on a network filesystem does not stop the training.

    Raises:
        EnvironmentProblem: One cannot be renamed.
    """
    paths = list_checkpoints(directory)
    spare = set(paths[-max(1, keep) :]) | {p for p in paths if step_of(p) == best_step}
    removed = [path for path in paths if path not in spare]
    for path in removed:
        # renamed first, so that a kill in the middle leaves no torn checkpoint behind
        doomed = path.with_name(f".{path.name}.old{PARTIAL_SUFFIX}")
        shutil.rmtree(doomed, ignore_errors=True)
        _rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def find_checkpoint(directory: Path, which: str) -> Path:
    """Returns the checkpoint that ``--checkpoint`` means: ``best``, ``last`` or a step.

    Args:
        directory: ``checkpoints`` of a run.
        which: As on the command line. Without held-out samples the best is the last.

    Raises:
        RunError: There is none; the message lists the steps there are.
        WeightsError: It is torn.
    """
    paths = list_checkpoints(directory)
    step: int | None = int(which) if which.isdecimal() else None
    if paths and which in ("last", "best"):
        newest = load_state(paths[-1])
        step = newest.best_step if which == "best" else newest.step
    for path in paths:
        if step_of(path) == step:
            load_state(path)
            return path
    raise RunError(
        f"no checkpoint {which!r}" + (f" (step {step})" if which == "best" and paths else ""),
        where=str(directory),
        fix="choose best, last or one of: " + (", ".join(str(step_of(p)) for p in paths) or "none"),
    )
