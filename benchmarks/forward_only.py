"""Two pipeline stages: forward only against the published design, which runs a full backward.

    python benchmarks/forward_only.py                 # two CPU processes, gloo

The published code lets stage inputs require gradients, so that megatron-core's schedule runs a
backward pass through the frozen backbone. Here the same model, samples, heads and objective go
through, in one run:

  published        megatron-core's forward-backward schedule, best of several microbatch sizes
  published eager  the same with the objective that keeps [tokens, V] (autograd through all of it)
  forward only     megatron-core's schedule without backward, at the same microbatch
  ours             the engine: forward only, samples packed end to end, gate and rotation in place,
                   best of several sizes, too

Prints one JSON object: seconds a step, tokens a second, peak memory of each stage's process beyond
the model, and the ratios, which split the gain into no-backward, packing and objective. The bubble
of the published schedule is (stages - 1) / (microbatches + stages - 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from autodeco.engines.base import HiddenBatch, OutputWeight
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums
from autodeco.registry import Registry
from autodeco.training.batching import microbatches
from autodeco.training.data import Sample

STAGES = 2
SIZES: dict[str, Any] = {
    "num_layers": 16,
    "hidden_size": 256,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
}
SIZES |= {"ffn_size": 768, "vocab_size": 8192, "tied_embeddings": False}
ALPHA = 30.0
MICRO_BATCH_TOKENS = (256, 512, 1024)


def samples(count: int, longest: int) -> list[Sample]:
    """Samples of a quarter of `longest` tokens up to it; the first eighth is the prompt."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        length = int(random.integers(longest // 4, longest + 1))
        predict = (np.arange(length) >= length // 8) & (np.arange(length) < length - 1)
        ids = random.integers(0, SIZES["vocab_size"], length).astype(np.int32)
        found.append(Sample(number, ids, predict, number + 1))
    return found


def build_engine(directory: Path) -> Any:
    """The engine of this rank, over a random checkpoint that rank 0 writes."""
    from autodeco.convert.random_checkpoint import write_random_checkpoint
    from autodeco.convert.source import open_source
    from autodeco.engines.megatron.engine import MegatronEngine
    from autodeco.job import Job
    from autodeco.layout import ParallelLayout

    resolution = Registry().resolve("qwen3", None, "8b")
    family, preset = resolution.family, resolution.preset
    preset = dataclasses.replace(preset, shape=dataclasses.replace(preset.shape, **SIZES))
    if dist.get_rank() == 0:
        write_random_checkpoint(family, preset, directory / "model")
    dist.barrier()
    family = dataclasses.replace(family, presets=(preset,))
    weights = open_source(family, Job(model=directory / "model", preset=preset.name))
    architecture = family.architecture(preset.architecture)
    layout = ParallelLayout(pipeline=STAGES)
    return MegatronEngine(weights, architecture, layout, torch.device("cpu"), torch.float32)


def eager_loss(heads: DecodingHeads, h: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The unweighted objective (nll) as autograd takes it: every [tokens, V] is kept."""
    z = h @ weight.T
    t = heads.temperature(h)
    log_p = (z / t[:, None]).log_softmax(-1)
    p = log_p.exp()
    top = p.topk(5, -1).values
    features = torch.stack((top[:, 0], -(p * log_p).sum(-1), p.var(-1), top.sum(-1)), -1)
    top_p = heads.top_p(h, t, features)
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    mask = torch.exp(-ALPHA * torch.relu(ordered.cumsum(-1) - top_p[:, None]))
    masked = p * torch.zeros_like(p).scatter(-1, order, mask)
    soft = masked.gather(-1, label[:, None]).log()[:, 0] - masked.sum(-1).log()
    return -(log_p.gather(-1, label[:, None])[:, 0] + soft).sum()


class Published:
    """megatron-core's schedule over padded microbatches, as the published runs use it."""

    def __init__(self, engine: Any, heads: DecodingHeads, rows: list[Sample]) -> None:
        self.engine, self.heads, self.rows = engine, heads, rows
        self.longest = max(len(row.ids) for row in rows)
        self.weight = engine.output_weight().weight
        _let_the_schedule_run_on_cpu()

    def step(self, size: int, *, backward: bool, eager: bool = False) -> None:
        """One global batch in microbatches of `size` samples."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.heads.zero_grad()
        self.engine._announce(torch.arange(self.longest), ())
        groups = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]

        def forward(iterator: Any, model: Any) -> Any:
            group = next(iterator)
            ids = torch.zeros(len(group), self.longest, dtype=torch.int64)
            for n, row in enumerate(group):
                ids[n, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
            positions = torch.arange(self.longest).expand(len(group), -1)
            out = model(ids, positions, None)
            return out, lambda states: self._loss(states, group, eager)

        model = self.engine._model
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(groups),
            model=[model],
            num_microbatches=len(groups),
            seq_length=self.longest,
            micro_batch_size=size,
            forward_only=not backward,
        )

    def _loss(self, states: Tensor, group: list[Sample], eager: bool) -> Any:
        chosen, labels, ids, index = [], [], [], []
        for n, row in enumerate(group):
            at = torch.from_numpy(row.predict.nonzero()[0])
            chosen.append(states[n, at])
            labels.append(torch.from_numpy(row.ids.astype(np.int64))[at + 1])
            ids.append(torch.full((len(at),), row.id))
            index.append(at)
        h, label = torch.cat(chosen), torch.cat(labels)
        if eager:
            loss = eager_loss(self.heads, h, label, self.weight)
            return loss, {"loss": loss.detach()}
        leaf = h.detach().requires_grad_(h.requires_grad)
        hidden = HiddenBatch(leaf, label, torch.cat(ids), torch.cat(index))
        output = OutputWeight(self.weight, 0, len(self.weight))
        objective = OBJECTIVES["nll"]
        sums = objective_sums(self.heads, hidden, output, objective, seed=0, epoch=0, backward=True)
        value = torch.tensor(sums.loss)
        if leaf.grad is None:
            return value, {"loss": value}
        # The objective has run its own backward; this hands its gradient on to the backbone.
        return (h * leaf.grad).sum(), {"loss": value}


def differentiable(model: Any) -> Callable[[], None]:
    """Gives the layers back what the engine does in place; returns what undoes it."""
    from megatron.core.transformer.mlp import MLP

    from autodeco.engines.megatron import attention
    from autodeco.engines.megatron.model import GatedMLP

    layers: Any = attention

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return x * torch.cat((cos, cos), -1) + turned * torch.cat((sin, sin), -1)

    ours = layers.rotate
    gated = [module for module in model.modules() if isinstance(module, GatedMLP)]
    layers.rotate = rotate
    for module in gated:
        module.__class__ = MLP

    def undo() -> None:
        layers.rotate = ours
        for module in gated:
            module.__class__ = GatedMLP

    return undo


def _let_the_schedule_run_on_cpu() -> None:
    """megatron-core's schedule counts on "cuda" and waits for it; there is none here."""
    from megatron.core.pipeline_parallel import schedules

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*sizes: Any, **options: Any) -> Tensor:
            options.pop("device", None)
            return torch.zeros(*sizes, **options)

    if not torch.cuda.is_available():
        schedules.torch = Torch()
        torch.cuda.synchronize = lambda *_: None


def peak_mib(reset: bool = False) -> float:
    """Highest resident memory of this process since it was last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(step: Callable[[], None], repeat: int) -> dict[str, Any]:
    """Median seconds of a step over all ranks, and what it adds to each rank's memory."""
    step()
    before = peak_mib(reset=True)
    times = []
    for _ in range(repeat):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - start)
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, round(peak_mib() - before, 1))
    return {"seconds": round(statistics.median(times), 3), "peak_mib": peaks}


def worker(options: argparse.Namespace) -> None:
    """One stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    meeting = f"file://{options.meeting}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=STAGES)
    engine = build_engine(options.meeting.parent)
    heads = DecodingHeads(HeadsConfig(SIZES["hidden_size"]), torch.Generator().manual_seed(0))
    rows = samples(options.samples, options.longest)
    published = Published(engine, heads, rows)

    def ours(tokens: int) -> None:
        heads.zero_grad()
        batches = microbatches(rows, tokens, packed=engine.packs)
        for hidden in engine.hidden_states(batches):
            if hidden is not None:
                output = engine.output_weight()
                nll = OBJECTIVES["nll"]
                objective_sums(heads, hidden, output, nll, seed=0, epoch=0, backward=True)

    # The published design: what enters a stage requires a gradient.
    embedding = getattr(engine._model, "embedding", None)
    if embedding is not None:
        embedding.requires_grad_(True)
    undo = differentiable(engine._model)
    sizes = [size for size in (1, 2, 4, 8) if options.samples % size == 0]
    runs = {}
    for size in sizes:
        runs[size] = measure(lambda s=size: published.step(s, backward=True), options.repeat)  # type: ignore[misc]
    best = min(sizes, key=lambda size: float(runs[size]["seconds"]))
    results = {
        "published": {"microbatch": best, **runs[best]},
        "published eager": measure(
            lambda: published.step(best, backward=True, eager=True), options.repeat
        ),
    }
    if embedding is not None:
        embedding.requires_grad_(False)
    results["forward only"] = measure(lambda: published.step(best, backward=False), options.repeat)
    undo()
    packed = {n: measure(lambda n=n: ours(n), options.repeat) for n in MICRO_BATCH_TOKENS}  # type: ignore[misc]
    fewest = min(packed, key=lambda n: float(packed[n]["seconds"]))
    results["ours"] = {"micro_batch_tokens": fewest, **packed[fewest]}
    if dist.get_rank() == 0:
        print(json.dumps(summary(results, rows, best)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def summary(results: dict[str, Any], rows: list[Sample], best: int) -> dict[str, Any]:
    """Adds tokens a second and the ratios."""
    tokens = sum(len(row.ids) for row in rows)
    for row in results.values():
        row["tokens_per_second"] = round(tokens / row["seconds"], 1)
    seconds = {name: row["seconds"] for name, row in results.items()}
    groups = len(rows) // best
    return {
        **results,
        "ratios": {
            "no backward": round(seconds["published"] / seconds["forward only"], 2),
            "packing": round(seconds["forward only"] / seconds["ours"], 2),
            "objective": round(seconds["published eager"] / seconds["published"], 2),
            "ours against published": round(seconds["published"] / seconds["ours"], 2),
            "ours against published eager": round(seconds["published eager"] / seconds["ours"], 2),
        },
        "bubble": round((STAGES - 1) / (groups + STAGES - 1), 3),
        "tokens": tokens,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.meeting is not None:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, *sys.argv[1:], "--meeting", f"{place}/meeting"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(STAGES)}
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)})
            for rank in range(STAGES)
        ]
        codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit(f"a stage failed: {codes}")


if __name__ == "__main__":
    main()
