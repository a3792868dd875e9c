"""Checkpoints of a training run: heads, optimizer, position; written whole or not at all.

``<model>-<step>-<samples>/`` is itself a heads directory, so it can be exported, merged or served.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from autodeco.errors import AutodecoError, RunError, WeightsError
from autodeco.files import atomic_directory, atomic_write_bytes, atomic_write_json, read_json
from autodeco.heads.files import heads_config_json, load_heads
from autodeco.heads.modules import DecodingHeads

_NAME = re.compile(r".+-(\d+)-(\d+)")
HEADS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


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
    """

    step: int
    samples: int
    optimizer_steps: int
    total_steps: int
    seed: int
    job_hash: str
    best_step: int
    best_loss: float | None


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
    with atomic_directory(final, replace=True) as temporary:
        for name, data in files.items():
            atomic_write_bytes(temporary / name, data)
        atomic_write_json(temporary / "config.json", heads_config_json(heads, metadata, "float32"))
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        atomic_write_json(temporary / STATE, {**asdict(state), "sha256": hashes})
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainingState]:
    """Reads a checkpoint: heads, optimizer tensors, state.

    Raises:
        WeightsError: It is torn: a file is missing or its hash differs.
    """
    content = dict(read_json(path / STATE))
    try:
        hashes = content.pop("sha256")
        state = TrainingState(**content)
        for name, expected in hashes.items():
            found = hashlib.sha256((path / name).read_bytes()).hexdigest()
            if found != expected:
                raise WeightsError("the file is damaged", where=str(path / name))
        return load_file(path / HEADS), load_file(path / OPTIMIZER), state
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"the checkpoint is torn: {error}", where=str(path)) from error


def load_newest(
    directory: Path, warn: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainingState] | None:
    """Reads the newest checkpoint that is whole; torn ones are named aloud and passed over."""
    for path in reversed(list_checkpoints(directory)):
        try:
            return load_checkpoint(path)
        except AutodecoError as error:
            warn(f"checkpoint {path.name} cannot be used ({error.what}); trying the one before")
    return None


def remove_old(directory: Path, keep: int, best_step: int) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and the best; returns what was removed."""
    paths = list_checkpoints(directory)
    spare = set(paths[-max(1, keep) :]) | {p for p in paths if step_of(p) == best_step}
    removed = [path for path in paths if path not in spare]
    for path in removed:
        # renamed first, so that a kill in the middle leaves no torn checkpoint behind
        doomed = path.rename(path.with_name(f".{path.name}.partial"))
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def find_checkpoint(directory: Path, which: str) -> Path:
    """Returns the checkpoint that ``--checkpoint`` means: ``best``, ``last`` or a step.

    Raises:
        RunError: There is none; the message lists the steps there are.
    """
    paths = list_checkpoints(directory)
    if paths and which == "last":
        return paths[-1]
    if paths and which == "best":
        best = int(read_json(paths[-1] / STATE)["best_step"])
        return next((p for p in paths if step_of(p) == best), paths[-1])
    for path in paths:
        if which.isdigit() and step_of(path) == int(which):
            load_heads(path)
            return path
    raise RunError(
        f"no checkpoint {which!r}",
        where=str(directory),
        fix="choose best, last or one of: " + (", ".join(str(step_of(p)) for p in paths) or "none"),
    )
