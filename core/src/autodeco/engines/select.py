"""Chooses and builds the engine, device and dtype of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autodeco.engines.base import Engine
from autodeco.engines.hf import HFEngine
from autodeco.errors import EnvironmentProblem, UsageError
from autodeco.files import read_json
from autodeco.hookspecs import ImportedWeights

if TYPE_CHECKING:
    from autodeco.job import Job


def choose_device(name: str) -> torch.device:
    """Returns the device that ``--device`` means; under torchrun each process gets its own GPU.

    Raises:
        EnvironmentProblem: CUDA, or the GPU of that number, was asked for and is not there.
        UsageError: The name is none of cpu, cuda and cuda:N.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}", fix="use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"no engine runs on {name!r}", fix="use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise EnvironmentProblem(
                "CUDA is not available here", where="--device", fix="use --device cpu"
            )
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        count = torch.cuda.device_count()
        if device.index >= count:
            raise EnvironmentProblem(
                f"{device} is not there: the machine shows {count} GPUs",
                where="--device",
                fix="start one process a GPU, or name a GPU that is there",
            )
    return device


def choose_dtype(name: str, path: Path, device: torch.device) -> torch.dtype:
    """Returns the backbone's dtype: auto is float32 on CPU, on a GPU what the checkpoint has."""
    if name != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[name]
    if device.type == "cpu":
        return torch.float32
    config = read_json(path / "config.json")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    stored = stored.removeprefix("torch.")
    known = {"float32": torch.float32, "float16": torch.float16}
    return known.get(stored, torch.bfloat16)


def build_engine(job: Job, weights: ImportedWeights) -> Engine:
    """Builds the engine that the job names.

    Raises:
        WeightsError, NumericsError: The checkpoint cannot be loaded.
        EnvironmentProblem: The device is not there.
    """
    device = choose_device(job.device)
    dtype = choose_dtype(job.dtype, weights.path, device)
    return HFEngine(weights.path, device, dtype, trust_remote_code=job.trust_remote_code)
