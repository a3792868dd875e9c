"""Chooses and builds the engine, device and dtype of a job."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autodeco.engines.base import Engine
from autodeco.engines.hf import HFEngine
from autodeco.errors import EnvironmentProblem, UsageError
from autodeco.files import read_object
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout
from autodeco.processes import world_size
from autodeco.resolution import preset_of

if TYPE_CHECKING:
    from autodeco.family import Architecture, FamilySpec, ModelPreset
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
    config = read_object(path / "config.json")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    stored = stored.removeprefix("torch.")
    known = {"float32": torch.float32, "float16": torch.float16}
    return known.get(stored, torch.bfloat16)


def choose_engine(
    job: Job, preset: ModelPreset, ranks: int, architecture: Architecture | None = None
) -> tuple[str, ParallelLayout]:
    """Decides on engine and layout before any process meets another.

    Without ``--layout``, one process has the whole model, and several have the preset's layout.

    Args:
        job: The job.
        preset: Its preset.
        ranks: All processes.
        architecture: The preset's; it may say that the megatron engine cannot run it.

    Returns:
        ``hf`` or ``megatron``, and the layout.

    Raises:
        UsageError: The layout is impossible, or the engine cannot do it; the message has the
            arithmetic.
        EnvironmentProblem: megatron-core is needed and not installed.
    """
    if job.layout is not None:
        layout = ParallelLayout.parse(job.layout)
    else:
        layout = preset.layout if ranks > 1 else ParallelLayout()
    layout.data_ranks(preset.shape, ranks)
    name = job.engine
    imported = job.import_format == "torch_dist"
    if name == "auto":
        name = "megatron" if layout.is_parallel or imported else "hf"
    if name == "hf" and imported:
        raise UsageError(
            "the hf engine reads Hugging Face checkpoints, and the job imports torch_dist",
            where="--engine hf --import-format torch_dist",
            fix="use --engine megatron, or leave --import-format out: no import is needed",
        )
    if name == "hf" and layout.is_parallel:
        raise UsageError(
            f"the hf engine has the whole model in each process; the layout is {layout}",
            where="--engine hf",
            fix="use --engine megatron, or --layout tp=1",
        )
    if name == "megatron" and architecture is not None and architecture.no_megatron:
        raise UsageError(
            f"the megatron engine does not run {architecture.name}: {architecture.no_megatron}",
            where="--engine megatron" if job.engine == "megatron" else f"--layout {layout}",
            fix="use --engine hf and --layout tp=1",
        )
    if name == "megatron":
        require_megatron(
            f"the layout {layout} needs megatron-core, which is not installed"
            if job.engine == "auto" and layout.is_parallel
            else "megatron-core is not installed"
        )
    return name, layout


def require_megatron(otherwise: str) -> None:
    """Checks that megatron-core is installed.

    Args:
        otherwise: The error's text.

    Raises:
        EnvironmentProblem: It is not.
    """
    if not has_megatron():
        raise EnvironmentProblem(
            otherwise, where="--engine megatron", fix="pip install 'autodeco[megatron]'"
        )


def has_megatron() -> bool:
    """Whether megatron-core is installed; it is not imported."""
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:  # nothing called megatron is there at all
        return False


def decoding_model(engine: Engine, weights: ImportedWeights, job: Job) -> Any:
    """Returns a transformers model of the backbone, for answers: the engine's own, or a whole one.

    Args:
        engine: What trained.
        weights: The backbone's.
        job: Says whether model code of the checkpoint may run.

    Raises:
        WeightsError, NumericsError: The checkpoint cannot be loaded.
    """
    model = getattr(engine, "model", None)
    if model is not None:
        return model
    return hf_engine(job, weights, engine.device, engine.dtype).model


def hf_engine(
    job: Job, weights: ImportedWeights, device: torch.device, dtype: torch.dtype
) -> HFEngine:
    """Returns transformers' model of a checkpoint, as an engine.

    Raises:
        WeightsError, NumericsError: The checkpoint cannot be loaded.
    """
    return HFEngine(
        weights.path,
        device,
        dtype,
        trust_remote_code=job.trust_remote_code,
        formats=weights.formats,
        dropped=weights.weight_map.dropped,
    )


def build_engine(job: Job, weights: ImportedWeights, family: FamilySpec) -> Engine:
    """Builds the engine that the job names.

    Raises:
        WeightsError, NumericsError: The checkpoint cannot be loaded.
        EnvironmentProblem: The device or megatron-core is not there.
        UsageError: The layout is impossible.
    """
    preset = preset_of(family, job)
    architecture = family.architecture(preset.architecture)
    name, layout = choose_engine(job, preset, world_size(), architecture)
    device = choose_device(job.device)
    dtype = choose_dtype(job.dtype, weights.path, device)
    if name == "megatron":
        from autodeco.engines.megatron.engine import MegatronEngine

        return MegatronEngine(weights, architecture, layout, device, dtype, packing=job.packing)
    return hf_engine(job, weights, device, dtype)
