"""A small real engine, its data, and what a training run left: for the tests of training."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from autodeco.engines.base import HiddenBatch, OutputWeight, TokenBatch
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.job import Job
from autodeco.training.checkpoint import list_checkpoints
from autodeco.training.data import Sample, SampleSet
from autodeco.training.logging import METRICS, read_metrics
from autodeco.training.loop import TrainResult, train

VOCABULARY, HIDDEN = 23, 12
CLOCKS = {"seconds", "tokens_per_second"}


class TinyEngine:
    """A causal model without layers: an embedding table, averaged over the last tokens."""

    name = "tiny"
    device = torch.device("cpu")
    dtype = torch.float32
    hidden_size = HIDDEN
    vocab_size = VOCABULARY
    data_rank, data_world, counts, whole_samples = 0, 1, True, True
    packs, stages = False, 1

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self.weight = 2 * torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self.largest_batch = 0

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table[ids]
        before = torch.cat([torch.zeros(1, HIDDEN), h[:-1]])
        return h + 0.3 * before

    def hidden_states(self, batches: Iterable[TokenBatch]) -> Iterator[HiddenBatch | None]:
        for batch in batches:
            self.largest_batch = max(self.largest_batch, len(batch.ids))
            bounds = batch.cu_seqlens.tolist()
            parts = [self.states(batch.ids[a:b]) for a, b in itertools.pairwise(bounds)]
            at = batch.predict.nonzero()[:, 0]
            yield HiddenBatch(
                torch.cat(parts)[at],
                batch.ids[at + 1],
                batch.sample_id[at],
                batch.positions[at],
            )

    def output_weight(self) -> OutputWeight:
        return OutputWeight(self.weight, 0, VOCABULARY)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.table.numpy().tobytes()).hexdigest()


def sample_set(count: int, seed: int) -> SampleSet:
    """Walks of the engine's own model: after an even token at T = 0.3, after an odd one at 1.4."""
    engine, generator = TinyEngine(), torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        ids = [number % VOCABULARY, (3 * number) % VOCABULARY]
        for _ in range(6 + number % 9):
            logits = engine.states(torch.tensor(ids))[-1] @ engine.weight.T
            p = (logits / (0.3 if ids[-1] % 2 == 0 else 1.4)).softmax(-1)
            ids.append(int(torch.multinomial(p, 1, generator=generator)))
        predict = np.zeros(len(ids), dtype=np.bool_)
        predict[1:-1] = True
        samples.append(Sample(number, np.array(ids, dtype=np.int32), predict, number + 1))
    return SampleSet(tuple(samples), {}, Path("tiny.jsonl"))


def tiny_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "global_batch": 4,
        "micro_batch_tokens": 32,
        "epochs": 2,
        "save_every": 3,
        "eval_every": 4,
        "keep": 2,
        **changes,
    }
    return Job(**values)


def tiny_heads(heads: str = "both", seed: int = 0) -> DecodingHeads:
    config = HeadsConfig(HIDDEN, heads, intermediate_size=8)
    return DecodingHeads(config, torch.Generator().manual_seed(seed))


def run_training(
    directory: Path,
    job: Job,
    *,
    samples: int = 20,
    held_out: int = 6,
    heads: DecodingHeads | None = None,
    engine: Any = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains tiny heads in `directory`, as the pipeline would."""
    return train(
        job,
        engine or TinyEngine(),
        heads or tiny_heads(),
        sample_set(samples, 1),
        sample_set(held_out, 2),
        directory,
        "tiny",
        digest="0123",
        console=console or Console(quiet=True),
    )


def outcome(directory: Path) -> dict[str, Any]:
    """What must not depend on interruptions: last heads, optimizer, best step and metrics."""
    last = list_checkpoints(directory / "checkpoints")[-1]
    state = json.loads((last / "state.json").read_text())
    rows = read_metrics(directory / METRICS)
    return {
        "name": last.name,
        "hashes": state["sha256"],
        "best_step": state["best_step"],
        "metrics": [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows],
    }
