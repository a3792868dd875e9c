"""The objective's cost against its floor: the lm-head product alone, eager autograd, and ours.

    python benchmarks/objective.py                    # CPU, small; CUDA sizes where there is a GPU
    python benchmarks/objective.py --device cuda --repeat 7
    python benchmarks/objective.py --size 2048,4096,151936 --device cuda

One JSON line a size: median milliseconds of a training step (head forward and backward and the
lm-head product included) and peak memory beyond the inputs, all forms in the same run, with the
ratios. On CPU each form runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodeco.engines.base import HiddenBatch, OutputWeight
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums

CPU_SIZES = ((512, 128, 512), (256, 256, 20_000), (256, 256, 151_936))
CUDA_SIZES = ((2048, 4096, 151_936), (6144, 2880, 201_088), (6144, 7168, 129_280))
FORMS = ("lm-head", "eager", "nll", "megatron", "megatron, no drop", "hf")
ALPHA = 30.0


def make(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Any, Any, Any]:
    """Logits with the spread of a real model's (sigma 6), labels drawn from softmax(z)."""
    tokens, d, vocab = size
    g = torch.Generator(device).manual_seed(0)
    h = torch.randn(tokens, d, device=device, generator=g).to(dtype)
    w = torch.empty(vocab, d, device=device, dtype=dtype)
    for rows in torch.split(w, 8192):
        rows.copy_(torch.randn(rows.shape, device=device, generator=g) * (6 / d**0.5))
    labels = []
    for part in torch.split(h, 128):
        z = (part @ w.T).float()
        noise = torch.empty_like(z).exponential_(generator=g).log_()
        labels.append((z - noise).argmax(-1))
    index = torch.arange(tokens, device=device)
    hidden = HiddenBatch(h, torch.cat(labels), torch.zeros_like(index), index)
    heads = DecodingHeads(HeadsConfig(d), torch.Generator().manual_seed(0)).to(device)
    return hidden, OutputWeight(w, 0, vocab), heads


def eager(heads: DecodingHeads, hidden: HiddenBatch, w: Tensor) -> Tensor:
    """The published NeMo form without its drop: autograd keeps every [tokens, V] it needs."""
    z = (hidden.h @ w.T).float()
    y = hidden.label[:, None]
    t = heads.temperature(hidden.h)
    log_p = (z / t[:, None]).log_softmax(-1)
    p = log_p.exp()
    top = p.topk(5, -1).values
    features = torch.stack((top[:, 0], -(p * log_p).sum(-1), p.var(-1), top.sum(-1)), -1)
    top_p = heads.top_p(hidden.h, t, features)
    log_p_y = log_p.gather(-1, y)
    base = z.softmax(-1).gather(-1, y)
    ordered, order = p.sort(-1, descending=True)
    mask = torch.exp(-ALPHA * torch.relu(ordered.cumsum(-1) - top_p[:, None]))
    r = p * torch.zeros_like(p).scatter(-1, order, mask)
    r = r / (r.sum(-1, keepdim=True) + 1e-9)
    soft = torch.log(r.gather(-1, y) + 1e-9)
    return -(log_p_y.exp().detach() * log_p_y + base * soft).sum()


def step_of(form: str, hidden: Any, output: Any, heads: Any) -> Callable[[], None]:
    """One training step in the given form."""

    def product() -> None:
        with torch.no_grad():
            for part in hidden.h.split(1024):
                part @ output.weight.T

    def step_eager() -> None:
        heads.zero_grad()
        eager(heads, hidden, output.weight).backward()  # type: ignore[no-untyped-call]

    def ours() -> None:
        heads.zero_grad()
        name, _, rest = form.partition(", ")
        objective_sums(
            heads,
            hidden,
            output,
            OBJECTIVES[name],
            seed=0,
            epoch=0,
            backward=True,
            drop=0.0 if rest else None,
        )

    return {"lm-head": product, "eager": step_eager}.get(form, ours)


def resident_mib(reset: bool = False) -> float:
    """Highest resident memory of this process since it was last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None, "no VmHWM in /proc/self/status"
    return int(found[1]) / 1024


def measure(
    form: str, size: tuple[int, int, int], dtype: torch.dtype, device: str, repeat: int
) -> dict[str, Any]:
    """Median milliseconds and peak MiB of one form."""
    hidden, output, heads = make(size, dtype, device)
    step = step_of(form, hidden, output, heads)
    cuda = device == "cuda"
    try:
        if cuda:
            torch.cuda.empty_cache()
            before: float = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            before = resident_mib(reset=True)
        step()
        seconds = []
        for _ in range(repeat):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if cuda:
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            peak = resident_mib() - before
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    return {"ms": round(1e3 * statistics.median(seconds), 3), "peak_mib": round(peak, 1)}


def hardware(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--size", action="append", metavar="TOKENS,D,V")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None)
    parser.add_argument("--forms", default=";".join(FORMS), help="separated by ;")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        sizes = list(CUDA_SIZES if device == "cuda" else CPU_SIZES)
        if args.size:
            sizes = [(int(m), int(d), int(v)) for m, d, v in (s.split(",") for s in args.size)]
        dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
        for size in sizes:
            result = {}
            for form in args.forms.split(";"):
                job = (form, size, dtype, device, args.repeat)
                if device == "cuda":
                    result[form] = measure(*job)
                else:
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        result[form] = pool.apply(measure, job)
            for row in result.values():
                for against in ("lm-head", "eager"):
                    if "ms" in row and "ms" in result.get(against, {}):
                        row[f"time / {against}"] = round(row["ms"] / result[against]["ms"], 3)
            tokens, d, vocab = size
            line = {"tokens": tokens, "d": d, "vocab": vocab, "dtype": str(dtype), **result}
            print(json.dumps(line | hardware(device)), flush=True)


if __name__ == "__main__":
    main()
