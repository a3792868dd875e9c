"""Training steps at a real shape: seconds a step, and which part of them the objective takes.

    python benchmarks/training_step.py --preset 8b --engine hf --work /tmp/step
    python benchmarks/training_step.py --preset 8b --engine megatron --work /tmp/step
    torchrun --nproc-per-node 2 benchmarks/training_step.py --preset 8b --layout pp=2 \\
        --micro-batch-tokens 16384 4096 --work /tmp/step

Trains new heads on a random bf16 checkpoint of the preset's shape (made once in --work by
`real_shape.py`), random samples, every step a whole global batch. Prints one JSON line for each
--micro-batch-tokens: the seconds of every step and the median of the later ones. The first step is
cold, and in the next few the heads of random labels are on their way to a bound, where the
objective looks at most logits. Of a late step, on rank 0 and on the last one, the seconds between
the calls of the objective and their ends. `--uncapped` lets a pipeline have as large microbatches
as it is told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from real_shape import PROMPT_TOKENS, build_checkpoint  # type: ignore[import-not-found]
from rich.console import Console

from autodeco.convert.source import open_source
from autodeco.engines.select import build_engine
from autodeco.heads.attach import new_heads
from autodeco.job import Job
from autodeco.processes import rank, world_size
from autodeco.registry import Registry
from autodeco.training import batching, loop
from autodeco.training.data import Sample, SampleSet
from autodeco.training.logging import METRICS, read_metrics

COLD = 6  # steps


def samples(count: int, length: int, vocabulary: int) -> SampleSet:
    """Samples of `length` tokens, a tenth more or less, ids drawn over the whole vocabulary."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        tokens = int(length * random.uniform(0.9, 1.1))
        predict = (np.arange(tokens) >= PROMPT_TOKENS - 1) & (np.arange(tokens) < tokens - 1)
        ids = random.integers(0, vocabulary, tokens).astype(np.int32)
        found.append(Sample(number, ids, predict, number + 1))
    return SampleSet(tuple(found), {}, Path("random.jsonl"))


@contextmanager
def objective_timed() -> Iterator[list[float]]:
    """Collects the seconds of each call of the objective, the device waited for at both ends."""
    module: Any = loop
    plain, seconds = module.objective_sums, []

    def timed(*arguments: Any, **more: Any) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        sums = plain(*arguments, **more)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return sums

    module.objective_sums = timed
    try:
        yield seconds
    finally:
        module.objective_sums = plain


def train(job: Job, engine: Any, data: SampleSet, steps: int) -> list[float]:
    """Trains new heads for some steps; returns the seconds of each, on rank 0."""
    heads = new_heads(job, engine.hidden_size, engine.device)
    job = job.replace(max_steps=steps, epochs=steps)
    nothing = SampleSet((), {}, data.path)
    with tempfile.TemporaryDirectory() as place:
        arguments = (job, engine, heads, data, nothing, Path(place), "step")
        loop.train(*arguments, digest="0", console=Console(quiet=True))
        rows = read_metrics(Path(place) / METRICS)
    return [round(row["seconds"], 4) for row in rows if row["kind"] == "train"]


def measure(options: argparse.Namespace, engine: Any, job: Job) -> dict[str, Any]:
    """One line of the output."""
    data = samples(job.global_batch, options.length, engine.vocab_size)
    torch.cuda.reset_peak_memory_stats()
    seconds = train(job, engine, data, COLD + options.steps)
    peak = torch.cuda.max_memory_allocated()
    with objective_timed() as objective:
        train(job, engine, data, COLD + 1)
    mine = batching.microbatches(
        data.samples,
        job.micro_batch_tokens,
        world_size=engine.data_world,
        rank=engine.data_rank,
        packed=engine.packs,
        stages=engine.stages,
    )
    here = {
        "microbatches": [len(batch.ids) for batch in mine],
        "objective_seconds_a_step": round(sum(objective[-len(mine) :]), 4),
        "peak_gpu_gib": round(peak / 2**30, 2),
    }
    ranks: list[Any] = [None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(ranks, here)
    else:
        ranks = [here]
    tokens = sum(len(sample.ids) for sample in data.samples)
    row = {
        "engine": engine.name,
        "layout": options.layout or "tp=1",
        "packs": engine.packs,
        "micro_batch_tokens": job.micro_batch_tokens,
        "tokens_a_step": tokens,
        "first": ranks[0],
        "last": ranks[-1],
        "seconds": seconds,
    }
    if seconds:
        warm = statistics.median(seconds[COLD:])
        row |= {"median": warm, "tokens_per_second": round(tokens / warm)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plugin", default="qwen3")
    parser.add_argument("--preset", default="8b")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--engine", default="megatron")
    parser.add_argument("--layout")
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--micro-batch-tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--no-packing", action="store_true")
    parser.add_argument("--uncapped", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help=f"after {COLD} that do not count")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl")
    if rank() == 0:
        options.work.mkdir(parents=True, exist_ok=True)
        build_checkpoint(options.plugin, options.preset, options.work / "model", str(device))
    if world_size() > 1:
        dist.barrier()
    if options.uncapped:
        batching.FEWEST_TOKENS = 2**40
    resolution = Registry().resolve(options.plugin, None, options.preset)
    job = Job(
        plugin=options.plugin,
        preset=options.preset,
        model=options.work / "model",
        engine=options.engine,
        layout=options.layout,
        device="cuda",
        dtype="bfloat16",
        packing=not options.no_packing,
        global_batch=options.global_batch,
        save_every=10**6,
        eval_every=10**6,
    )
    began = time.monotonic()
    engine = build_engine(job, open_source(resolution.family, job), resolution.family)
    loaded = round(time.monotonic() - began, 1)
    for size in options.micro_batch_tokens:
        job = job.replace(micro_batch_tokens=size)
        row = measure(options, engine, job)
        row |= {"loading_seconds": loaded, "device": torch.cuda.get_device_name()}
        row["torch"] = torch.__version__
        if rank() == 0:
            print(json.dumps(row), flush=True)
    if world_size() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
