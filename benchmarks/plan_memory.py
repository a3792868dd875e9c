"""One GPU: the memory that `autodeco plan` predicts beside what PyTorch's allocator gave out.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --only 30b-a3b --predict

Each case gets random weights on the GPU (no checkpoint is written), runs three microbatches through
MegatronEngine and the objective with its gradient, and prints one JSON line: predicted and measured
bytes of the peak, and their ratio. ``--predict`` needs no GPU and leaves the measurement out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autodeco.engines.base import TokenBatch
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout
from autodeco.registry import Registry

LOGIT_SPREAD = 5.0  # of a trained model; a fresh one's is 0.6
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A preset, how many of its layers, and a microbatch of rows x length tokens."""

    preset: str
    layers: int
    rows: int
    length: int
    objective: str = "nll"


CASES = (
    Case("0.6b", 28, 4, 4096),
    Case("0.6b", 28, 1, 1024),
    Case("8b", 36, 1, 6144),
    Case("8b", 36, 16, 1024),
    Case("8b", 12, 2, 8192, "megatron"),
    Case("30b-a3b", 12, 1, 6144),
    Case("30b-a3b", 12, 16, 1024),
    Case("235b-a22b", 4, 2, 8192),
)


def request_of(plugin: str, case: Case) -> Any:
    """The plan's request for one GPU."""
    from autodeco.engines.megatron.plan import Request

    resolution = Registry().resolve(plugin, None, case.preset)
    family, preset = resolution.family, resolution.preset
    shape = dataclasses.replace(preset.shape, num_layers=case.layers)
    architecture = family.architecture(preset.architecture)
    names = [name for rule in family.weight_map.expand(shape) for name in rule.sources]
    return Request(
        architecture=architecture,
        config=architecture.config_json(shape),
        bound=family.weight_map.bind(shape, names),
        gpus=1,
        gpu_memory=1024 * GIB,
        reserve=0,
        micro_batch_tokens=case.rows * case.length,
        max_length=case.length,
        objective=case.objective,
    )


def fill(model: Any, *_: Any) -> None:
    """Random weights whose logits have the spread of a trained model's."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        norm = model.decoder.final_layernorm.weight
        norm.fill_(LOGIT_SPREAD / (0.02 * norm.numel() ** 0.5))


def random_engine(request: Any, device: torch.device) -> Any:
    """The engine with random weights."""
    from autodeco.engines.megatron import engine as engine_module
    from autodeco.engines.megatron.memory import replaced

    weights = ImportedWeights(Path(), "hf", request.bound, request.bound.shape)
    with (
        replaced(engine_module, "read_json", lambda path: request.config),
        replaced(engine_module, "load_stage", fill),
        device,
    ):
        return engine_module.MegatronEngine(
            weights, request.architecture, ParallelLayout(), device, request.dtype
        )


def random_batch(rows: int, length: int, vocabulary: int, number: int) -> TokenBatch:
    """Random tokens, all but the last of each row predicting."""
    generator = torch.Generator().manual_seed(number)
    predict = torch.ones(rows, length, dtype=torch.bool)
    predict[:, -1] = False
    return TokenBatch(
        ids=torch.randint(0, vocabulary, (rows * length,), generator=generator),
        positions=torch.arange(length).repeat(rows),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
        predict=predict.flatten(),
        sample_id=torch.arange(rows).repeat_interleave(length),
    )


def measured_peak(request: Any, case: Case, device: torch.device) -> int:
    """Bytes that the allocator gave out at most, once weights and heads are there."""
    engine = random_engine(request, device)
    heads = DecodingHeads(HeadsConfig(engine.hidden_size)).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), foreach=False)
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batches = [random_batch(case.rows, case.length, engine.vocab_size, n) for n in range(3)]
    for hidden in engine.hidden_states(batches):
        assert hidden is not None
        objective_sums(
            heads,
            hidden,
            engine.output_weight(),
            OBJECTIVES[case.objective],
            seed=0,
            epoch=0,
            backward=True,
        )
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plugin", default="qwen3")
    parser.add_argument("--only", help="this preset alone")
    parser.add_argument("--predict", action="store_true", help="no measurement, no GPU")
    options = parser.parse_args()
    if not options.predict and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --predict does without")
    from autodeco.engines.megatron.plan import sketch_layout

    for case in CASES:
        if options.only not in (None, case.preset):
            continue
        start = time.perf_counter()
        request = request_of(options.plugin, case)
        [rank] = sketch_layout(request, ParallelLayout()).ranks
        memory = rank.memory
        row: dict[str, Any] = {**dataclasses.asdict(case), "predicted": memory.peak}
        row["parts"] = {n: round(s / GIB, 3) for n, s in dataclasses.asdict(memory).items()}
        if not options.predict:
            row["measured"] = measured_peak(request, case, torch.device("cuda", 0))
            row["ratio"] = round(memory.peak / row["measured"], 4)
            row["device"] = torch.cuda.get_device_name()
            dist.destroy_process_group()  # the next plan stands for ranks of its own
            gc.collect()
            torch.cuda.empty_cache()
        row["torch"] = torch.__version__
        row["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
