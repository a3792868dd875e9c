"""The family's random model at the job's layout, against transformers in one process."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodeco.doctor.meeting import Meeting
from autodeco.doctor.report import MISSING, OK, PROBLEM, Row
from autodeco.engines.base import HiddenBatch, TokenBatch
from autodeco.errors import PluginError, UsageError
from autodeco.family import FamilySpec, ModelPreset, ModelShape
from autodeco.layout import ParallelLayout
from autodeco.support import installed

# float32 on both sides; a GPU sums in another order than transformers' kernels there
TOLERANCE = {"cpu": 5e-5, "cuda": 1e-3}
_LENGTHS = (24, 17)
_NAME = "debug model"


def random_preset(
    family: FamilySpec, layout: ParallelLayout, ranks: int
) -> tuple[ModelPreset, ParallelLayout]:
    """Returns a preset with random weights that the layout fits.

    The first that fits as it is; else the first one stretched until the layout fits, with even
    stages: groups of the same sizes compute and speak all the same.

    Raises:
        PluginError: The family has no random preset, or none with experts.
    """
    presets = [
        p for p in family.presets if p.random and (p.shape.num_experts or layout.expert == 1)
    ]
    for preset in presets:
        try:
            layout.data_ranks(preset.shape, ranks)
        except UsageError:
            continue
        return preset, layout
    if not presets:
        raise PluginError(
            "the family has no preset with random weights"
            + (" and experts" if layout.expert > 1 else ""),
            who=family.id,
            fix="add one to the plugin: a ModelPreset with random=True",
        )
    even = dataclasses.replace(layout, first_stage_layers=None, last_stage_layers=None)
    shape = stretched(presets[0].shape, even)
    even.data_ranks(shape, ranks)
    return dataclasses.replace(presets[0], shape=shape), even


def stretched(shape: ModelShape, layout: ParallelLayout) -> ModelShape:
    """Returns the shape with every size rounded up to what the layout divides."""

    def up(size: int, parts: int) -> int:
        return -(-size // parts) * parts

    groups = up(shape.num_kv_heads, layout.tensor)
    return dataclasses.replace(
        shape,
        num_layers=up(shape.num_layers, layout.pipeline),
        num_heads=up(shape.num_heads, math.lcm(groups, layout.tensor)),
        num_kv_heads=groups,
        ffn_size=up(shape.ffn_size, layout.tensor),
        vocab_size=up(shape.vocab_size, layout.tensor),
        num_experts=up(shape.num_experts, layout.expert),
        expert_ffn_size=up(shape.expert_ffn_size, layout.tensor),
    )


def debug_model(
    meeting: Meeting,
    family: FamilySpec,
    preset: ModelPreset,
    layout: ParallelLayout,
    device: torch.device,
) -> Iterator[Row]:
    """Compares the logits of every rank with those of the hf engine on rank 0.

    Each rank writes the small checkpoint for itself, so this needs no shared directory.

    Args:
        meeting: Where the ranks met.
        family: The plugin's data.
        preset: Of `random_preset`.
        layout: The layout that it fits.
        device: This rank's.
    """
    from autodeco.convert.random_checkpoint import write_random_checkpoint

    engine = "megatron" if "megatron-core" in installed("megatron-core") else "hf"
    if engine == "hf" and layout.is_parallel:
        if meeting.rank == 0:
            said = f"the layout {layout} needs megatron-core"
            yield Row(_NAME, said, PROBLEM, "pip install 'autodeco[megatron]'", needed=True)
        return
    family = dataclasses.replace(family, presets=(preset,))
    with tempfile.TemporaryDirectory(prefix="autodeco-doctor-") as place:
        meeting.leftovers.append(Path(place))
        path = write_random_checkpoint(family, preset, Path(place) / "model")
        batch = _batch(preset.shape.vocab_size)
        meeting.step(f"{_NAME}: transformers on rank 0")
        reference = _reference(meeting, path, batch, preset.shape, device)
        meeting.step(f"{_NAME}: loading")
        built = _build(family, preset, path, engine, layout, device)
        meeting.step(f"{_NAME}: running")
        found = difference(built, batch, reference)
        meeting.step(f"{_NAME}: done")
    results = meeting.gather("difference", [found, _copy_of_the_model(engine, meeting.rank)])
    if meeting.rank == 0:
        what = f"{family.id} {preset.name}, {engine} engine at {layout}, float32 on {device.type}"
        yield judge(meeting, results, TOLERANCE[device.type], what)
        if engine == "hf":
            yield Row("megatron-core", "not installed", MISSING, "pip install 'autodeco[megatron]'")


def judge(meeting: Meeting, results: list[Any], limit: float, what: str) -> Row:
    """Returns the row: the largest difference, or who is beyond the limit."""
    numbers = {r: float(value) for r, (value, _) in enumerate(results) if value is not None}
    wrong = {r: value for r, value in numbers.items() if not value <= limit}
    if not numbers:
        return Row(_NAME, f"{what}: no rank has logits", PROBLEM, "report this", needed=True)
    if not wrong:
        said = f"{what}: logits differ by {max(numbers.values()):.1e} at most (limit {limit:.0e})"
        return Row(_NAME, said, OK)
    lines = [f"{what}: logits differ by more than {limit:.0e} from transformers on rank 0:"]
    for number, value in wrong.items():
        stages = [r for r in results[number][1] if r != number]
        behind = f", fed by {', '.join(map(meeting.place, stages))}" if stages else ""
        lines.append(f"{meeting.place(number)}: {value:.1e}{behind}")
    cure = "run autodeco doctor on these hosts; then try each alone, with one process"
    return Row(_NAME, "\n".join(lines), PROBLEM, cure, needed=True)


def _batch(vocabulary: int) -> TokenBatch:
    """Two sequences of random tokens, the same on every rank; all but the last ones predict."""
    starts = [0, *(sum(_LENGTHS[: i + 1]) for i in range(len(_LENGTHS)))]
    generator = torch.Generator().manual_seed(1)
    predict = torch.ones(starts[-1], dtype=torch.bool)
    predict[[end - 1 for end in starts[1:]]] = False
    lengths = torch.tensor(_LENGTHS)
    return TokenBatch(
        ids=torch.randint(vocabulary, (starts[-1],), generator=generator),
        positions=torch.cat([torch.arange(n) for n in _LENGTHS]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        predict=predict,
        sample_id=torch.repeat_interleave(torch.arange(len(_LENGTHS)), lengths),
    )


def _reference(
    meeting: Meeting, path: Path, batch: TokenBatch, shape: ModelShape, device: torch.device
) -> Tensor:
    """Returns the logits [n, V] of transformers on rank 0, given to all; rows as in the batch."""
    from autodeco.engines.hf import HFEngine

    logits = torch.zeros(len(batch.ids), shape.vocab_size, device=device)
    if meeting.rank == 0:
        engine = HFEngine(path, device, torch.float32)
        (hidden,) = engine.hidden_states([batch])
        assert hidden is not None
        logits[batch.predict.to(device)] = hidden.h @ engine.output_weight().weight.T
    meeting.step(f"{_NAME}: handing out the reference")
    dist.broadcast(logits, src=0)
    return logits


def _build(
    family: FamilySpec,
    preset: ModelPreset,
    path: Path,
    engine: str,
    layout: ParallelLayout,
    device: torch.device,
) -> Any:
    from autodeco.convert.source import open_source
    from autodeco.engines.select import build_engine
    from autodeco.job import Job

    job = Job(
        plugin=family.id,
        preset=preset.name,
        model=path,
        engine=engine,
        layout=str(layout),
        device=str(device),
        dtype="float32",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core lists all that it does without
        return build_engine(job, open_source(family, job), family)


def difference(engine: Any, batch: TokenBatch, reference: Tensor) -> float | None:
    """Returns this rank's largest difference; None where it has no logits."""
    row = {
        key: number
        for number, key in enumerate(
            zip(batch.sample_id.tolist(), batch.positions.tolist(), strict=True)
        )
    }
    worst: float | None = None
    output = engine.output_weight()
    for hidden in list(engine.hidden_states([batch])):  # all of it, whatever is found
        if not isinstance(hidden, HiddenBatch):
            continue
        keys = zip(hidden.sample_id.tolist(), hidden.token_index.tolist(), strict=True)
        rows = torch.tensor([row[key] for key in keys], device=reference.device, dtype=torch.int64)
        columns = slice(output.first_token, output.first_token + output.weight.shape[0])
        distance = (hidden.h @ output.weight.T - reference[rows][:, columns]).abs()
        worst = max(worst or 0.0, float(distance.max()) if distance.numel() else 0.0)
    return worst


def _copy_of_the_model(engine: str, rank: int) -> list[int]:
    """Returns the ranks of this rank's pipeline: what it computes came through them."""
    if engine != "megatron":
        return [rank]
    from megatron.core import parallel_state

    return list(
        map(int, dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()))
    )
