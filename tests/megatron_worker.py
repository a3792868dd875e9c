"""One rank of the megatron tests: logits and training of several cases in one group of processes.

python megatron_worker.py ROOT CASES NAME DEVICE    # RANK and WORLD_SIZE set; cpu or cuda
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from autodeco.convert.source import open_source
from autodeco.engines.base import HiddenBatch, OutputWeight, TokenBatch
from autodeco.engines.hf import HFEngine
from autodeco.engines.select import build_engine
from autodeco.heads.attach import new_heads
from autodeco.job import Job
from autodeco.training import loop
from autodeco.training.batching import pack
from autodeco.training.data import Sample, SampleSet
from autodeco.training.logging import METRICS, read_metrics
from autodeco_plugin_qwen3.family import FAMILY

STEPS = 20
# Of the random models' logits, no label's is within 7e-6 of another token's: the order of two that
# are closer depends on rounding, and with it what the top-p mask makes of the label.
SAMPLES = 15
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def samples(count: int, vocabulary: int, seed: int) -> SampleSet:
    """Sequences of 12 to 60 random tokens; the first 5 are the prompt."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(random.integers(12, 60))
        predict = np.arange(length) >= 4
        predict[-1] = False
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        found.append(Sample(number, ids, predict, number + 1))
    return SampleSet(tuple(found), {}, Path("random.jsonl"))


def job_of(model: Path, preset: str, layout: str | None, **changes: Any) -> Job:
    """A short training run; layout None: the hf engine."""
    values: dict[str, Any] = {
        "plugin": "qwen3",
        "preset": preset,
        "model": model,
        "device": "cpu",
        "dtype": "float32",
        "engine": "hf" if layout is None else "megatron",
        "layout": layout,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "global_batch": 8,
        "micro_batch_tokens": 128,
        "max_steps": STEPS,
        "save_every": 1000,
        "eval_every": 1000,
        **changes,
    }
    return Job(**values)


def logits(engine: Any, batches: list[TokenBatch]) -> dict[tuple[int, int], torch.Tensor]:
    """(sample, token) -> logits, the slices of tensor ranks joined; empty off the last stage."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    output: OutputWeight = engine.output_weight()
    for hidden in engine.hidden_states(batches):
        if not isinstance(hidden, HiddenBatch):
            continue
        mine = hidden.h @ output.weight.T
        if output.group is not None:
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(output.group))]
            dist.all_gather(parts, mine, group=output.group)
            mine = torch.cat(parts, dim=-1)
        keys = zip(hidden.sample_id.tolist(), hidden.token_index.tolist(), strict=True)
        found |= dict(zip(keys, mine, strict=True))
    return found


def trained(job: Job, engine: Any, out: Path) -> dict[str, Any]:
    """Trains; returns the first gradient and how far the heads went, on the CPU."""
    gradients: list[torch.Tensor] = []
    plain = loop.add_gradients

    def record(flat: torch.Tensor) -> None:
        plain(flat)
        if not gradients:
            gradients.append(flat.cpu().clone())

    loop.add_gradients = record
    heads = new_heads(job, engine.hidden_size, engine.device)
    start = torch.cat([p.detach().flatten().cpu().clone() for p in heads.parameters()])
    train_set, held_out = samples(24, engine.vocab_size, SAMPLES), samples(4, engine.vocab_size, 2)
    quiet = Console(quiet=True)
    job = job.replace(epochs=10)
    arguments = (job, engine, heads, train_set, held_out, out, "tiny")
    loop.train(*arguments, digest="0", console=quiet)
    loop.add_gradients = plain
    end = torch.cat([p.detach().flatten().cpu() for p in heads.parameters()])
    return {"gradient": gradients[0], "moved": end - start}


def alike(tensor: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return all(torch.equal(parts[0], part) for part in parts)


def case(
    model: Path, preset: str, layout: str | None, root: Path, name: str, device: torch.device
) -> dict[str, Any]:
    """Logits and training at one layout (None: the hf engine), against the hf engine."""
    job = job_of(model, preset, layout, device=str(device))
    engine = build_engine(job, open_source(FAMILY, job), FAMILY)
    batch = samples(6, engine.vocab_size, 3).samples
    batches = [pack(batch[:4]), pack(batch[4:])]
    got = logits(engine, batches)
    report: dict[str, Any] = {"preset": preset, "layout": layout or "hf"}
    reference = logits(HFEngine(model, device, torch.float32), batches)
    worst = max((float((got[k] - reference[k]).abs().max()) for k in got), default=0.0)
    out = root / name
    result = trained(job, engine, out)
    report["same"] = alike(result["moved"])
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, (worst, set(got)))
    report["logits"] = max(value for value, _ in boxes)
    # every context rank has a part of each sample, and together they have all
    assert set().union(*(keys for _, keys in boxes)) == set(reference)
    if dist.get_rank() == 0:
        expected = torch.load(root / f"{preset}.pt", weights_only=True)
        for key in ("gradient", "moved"):
            difference = result[key] - expected[key]
            report[key] = float(difference.norm() / expected[key].norm())
        report["losses"] = losses(out)
    return report


def losses(out: Path) -> list[float]:
    """The training losses of a run."""
    return [row["loss"] for row in read_metrics(out / METRICS) if row["kind"] == "train"]


def device_of(kind: str, rank: int) -> torch.device:
    """This rank's device; float32 is float32 there."""
    if kind == "cpu":
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank)
    torch.cuda.set_device(device)
    return device


def main() -> None:
    warnings.simplefilter("ignore")
    root, cases, name, kind = Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:5]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = device_of(kind, rank)
    meeting = f"file://{root / name}"
    dist.init_process_group(BACKENDS[kind], init_method=meeting, rank=rank, world_size=world)
    reports = [
        case(root / preset, preset, layout, root, f"{name}-{number}", device)
        for number, (preset, layout) in enumerate(cases)
    ]
    if rank == 0:
        (root / f"{name}.json").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
