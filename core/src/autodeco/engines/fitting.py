"""Chooses the layout of ``--preset auto``: the best that fits the memory of the job's processes."""

from __future__ import annotations

import contextlib
import os
import warnings
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autodeco.engines.select import choose_device, choose_dtype, has_megatron
from autodeco.errors import EnvironmentProblem, UsageError
from autodeco.family import AUTO_PRESET, FamilySpec, ModelPreset
from autodeco.layout import ParallelLayout

if TYPE_CHECKING:
    from autodeco.job import Job

_GIB = 2**30
RESERVE = 4 * _GIB


def require_planner(what: str) -> None:
    """Imports the planner without megatron-core's warnings of what is not installed.

    Args:
        what: Who needs it, for the message.

    Raises:
        EnvironmentProblem: megatron-core is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import autodeco.engines.megatron.plan  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise EnvironmentProblem(
            "a plan is made with megatron-core, which is not installed",
            where=what,
            fix="pip install 'autodeco[megatron]'",
        ) from error


def is_to_be_fitted(job: Job, preset: ModelPreset, ranks: int) -> bool:
    """Whether nothing but the memory says how the model is to be spread."""
    return preset.name == AUTO_PRESET and job.layout is None and ranks > 1 and job.engine != "hf"


def fitting_layout(job: Job, family: FamilySpec, preset: ModelPreset, ranks: int) -> ParallelLayout:
    """Returns the layout that ``autodeco plan`` puts first for the job's processes.

    It depends on the checkpoint's ``config.json``, the options, the number of processes and the
    memory of one of them, so all processes of equal machines come to the same. Nothing is read of
    the weights. It must be called before the processes have met: the planner forms groups of
    its own and leaves none behind.

    Args:
        job: With ``model`` set.
        family: Its family.
        preset: Its preset, of the checkpoint's sizes.
        ranks: All processes.

    Raises:
        EnvironmentProblem: The model does not fit one process, and megatron-core, which could
            spread it, is not installed; or the device is not there.
        UsageError: No layout fits; the message has the arithmetic of the first one.
    """
    assert job.model is not None
    architecture = family.architecture(preset.architecture)
    device = choose_device(job.device)
    dtype = choose_dtype(job.dtype, job.model, device)
    memory = process_memory(device)
    budget = memory - min(RESERVE, memory // 2)
    if architecture.no_megatron or not has_megatron():
        weights = _weights(family, preset) * dtype.itemsize
        if weights <= budget:
            return ParallelLayout()
        raise EnvironmentProblem(
            f"the weights take {weights / _GIB:.1f} GiB, and each of the {ranks} processes has "
            f"{budget / _GIB:.1f} GiB for them; spreading the model over processes needs the "
            "megatron engine, "
            + (
                f"which does not run {architecture.name}: {architecture.no_megatron}"
                if architecture.no_megatron
                else "and megatron-core is not installed"
            ),
            where=f"--preset {AUTO_PRESET}",
            fix="use a machine with more memory"
            if architecture.no_megatron
            else "pip install 'autodeco[megatron]'",
        )
    require_planner(f"--preset {AUTO_PRESET}")
    from autodeco.engines.megatron.layouts import find_layouts
    from autodeco.engines.megatron.requests import request_for

    request = request_for(
        family,
        preset,
        job.model,
        None,
        gpus=ranks,
        gpu_memory=memory,
        reserve=memory - budget,
        dtype=dtype,
        micro_batch_tokens=job.micro_batch_tokens,
        max_length=job.max_length,
        objective=job.objective,
    )
    found = find_layouts(request, 1)
    if found.fitting:
        return found.fitting[0].layout
    refused = found.refused[-1]
    raise UsageError(
        f"no layout fits {ranks} processes of {memory / _GIB:.1f} GiB each; the last that was "
        f"tried, {refused.layout}: {refused.reason}",
        where=f"--preset {AUTO_PRESET}",
        fix="start more processes or take a smaller --micro-batch-tokens (autodeco plan shows "
        "what each needs), or give --layout",
    )


def process_memory(device: torch.device) -> int:
    """Returns the bytes that one process of the job has: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_memory() -> int:
    """Returns the bytes of this machine, or of this container where that has fewer."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ValueError, OSError):  # ValueError: "max", without a limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def _weights(family: FamilySpec, preset: ModelPreset) -> int:
    """Elements of the whole model."""
    rules = family.weight_map.expand(preset.shape)
    return sum(prod(part.size) for rule in rules for part in rule.parts)
