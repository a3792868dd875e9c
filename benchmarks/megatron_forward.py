"""One GPU: the megatron engine's forward pass beside transformers' own, at a real shape.

    python benchmarks/megatron_forward.py --preset 8b
    python benchmarks/megatron_forward.py --preset 30b-a3b --layers 8

Both models get random bf16 weights on the GPU (no checkpoint is written) and run the same tokens
without gradient; megatron's packed end to end, as the engine does it, transformers' in its decoder
with sdpa, as the hf engine does. Prints one JSON
line a batch: median milliseconds and peak memory beyond the weights of both, and the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from autodeco.family import Architecture, ModelShape
from autodeco.layout import ParallelLayout
from autodeco.registry import Registry

BATCHES = ((1, 6144), (4, 1536), (16, 1024))


def transformers_decoder(config: dict[str, Any], device: torch.device) -> Any:
    """transformers' decoder with random weights."""
    values = dict(config)
    values.pop("architectures")
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
    return model.eval().requires_grad_(False).get_decoder()


def megatron_stage(
    shape: ModelShape, architecture: Architecture, config: dict[str, Any], device: torch.device
) -> Any:
    """The whole model as one megatron stage with random weights."""
    from megatron.core import parallel_state

    from autodeco.engines.megatron.compat import apply_cures
    from autodeco.engines.megatron.model import build_stage, stack_experts
    from autodeco.engines.megatron.settings import transformer_config

    apply_cures()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    layout = ParallelLayout()
    values = transformer_config(shape, architecture, config, layout, torch.bfloat16, device)
    model = build_stage(values, shape, architecture, first=True, last=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    stack_experts(model.to(device))
    return model


def microbatch(config: dict[str, Any], rows: int, length: int, device: torch.device) -> Any:
    """What the engine tells its attention layers: rows laid end to end."""
    from autodeco.engines.megatron.attention import Microbatch
    from autodeco.engines.megatron.rotary import rotary_of

    positions = torch.arange(length).repeat(rows)
    tables = rotary_of(config, "preset").tables(positions, torch.bfloat16, device)
    bounds = tuple(range(0, rows * length + 1, length))
    starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    return Microbatch(*tables, bounds, starts)


def measure(step: Callable[[], Any], device: torch.device, repeat: int) -> dict[str, float]:
    """Median milliseconds of a forward pass, and the memory that it adds."""
    cuda = device.type == "cuda"
    for _ in range(3):
        step()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return {"ms": round(1e3 * statistics.median(times), 2), "peak_mib": round(peak / 2**20, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plugin", default="qwen3")
    parser.add_argument("--preset", default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    resolution = Registry().resolve(options.plugin, None, options.preset)
    architecture = resolution.family.architecture(resolution.preset.architecture)
    shape = resolution.preset.shape
    if options.layers:
        shape = dataclasses.replace(shape, num_layers=options.layers)
    config = architecture.config_json(shape)
    device = torch.device(options.device)
    stage = megatron_stage(shape, architecture, config, device)
    decoder = transformers_decoder(config, device)
    from autodeco.engines.megatron.attention import announce

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for rows, length in BATCHES:
        ids = torch.randint(0, shape.vocab_size, (rows, length), device=device)
        announce(stage, microbatch(config, rows, length, device))
        packed = ids.view(1, -1)
        with torch.no_grad():
            ours = measure(lambda i=packed: stage(i, i, None), device, options.repeat)  # type: ignore[misc]
            theirs = measure(
                lambda i=ids: decoder(input_ids=i, use_cache=False),  # type: ignore[misc]
                device,
                options.repeat,
            )
        row = {
            "preset": options.preset,
            "layers": shape.num_layers,
            "rows": rows,
            "length": length,
            "megatron": ours,
            "transformers": theirs,
            "time ratio": round(ours["ms"] / theirs["ms"], 3),
            "device": name,
            "torch": torch.__version__,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
