"""Casts a synthetic FP8 checkpoint, beside cp of the same bytes and a loop over its tensors.

    python benchmarks/cast.py --directory DISK/bench --gigabytes 6

All three in turn, caches dropped before each, fsync inside each timing, the median of three. The
goal: at least 60 % of the speed of ``cp --reflink=never`` of the written bytes, peak memory under
1 GiB + the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

import disk
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autodeco.convert.cast_plan import plan_cast
from autodeco.convert.shard_writer import ShardWriter, plan_shard
from autodeco.safetensors_header import INDEX

_WIDTH, _EXPERT = 7168, 2048  # of DeepSeek-V3


def make_source(directory: Path, gigabytes: float, shards: int) -> None:
    """Writes experts of DeepSeek-V3's names and sizes, in blocks of FP8, and their scales."""
    matrices = int(gigabytes * 2**30 / (_WIDTH * _EXPERT))
    names = [
        f"model.layers.{3 + number // 768}.mlp.experts.{number // 3 % 256}.{what}_proj.weight"
        for number, what in zip(range(matrices), ("gate", "up", "down") * matrices, strict=False)
    ]
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(_WIDTH * _EXPERT, generator=generator).mul_(60).to(torch.float8_e4m3fn)
    data = every.view(torch.uint8).numpy().data
    scale = torch.rand(_WIDTH // 128 * (_EXPERT // 128), generator=generator).mul_(1e-3)
    table: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        entries: list[tuple[str, str, tuple[int, ...]]] = []
        for name in names[number::shards]:
            shape = (_WIDTH, _EXPERT) if "down" in name else (_EXPERT, _WIDTH)
            entries.append((name, "F8_E4M3", shape))
            entries.append((name + "_scale_inv", "F32", tuple(n // 128 for n in shape)))
        with ShardWriter(directory / file, plan_shard(entries)) as writer:
            for name, dtype, _ in entries:
                writer.write(name, 0, data if dtype == "F8_E4M3" else scale.numpy().data)
        table |= {name: file for name, _, _ in entries}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (directory / "config.json").write_text(json.dumps(config))


def plain_loop(source: Path, output: Path) -> None:
    """One tensor after the other, as anyone would write it with torch and safetensors."""
    output.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                if name.endswith("_scale_inv"):
                    continue
                weight, scale = reader.get_tensor(name), reader.get_tensor(name + "_scale_inv")
                spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                tensors[name] = (weight.float() * spread).to(torch.bfloat16)
        save_file(tensors, output / shard.name)
    disk.sync_files(output)


def main() -> None:
    """Measures, or does the plain loop in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of FP8")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-loop", action="store_true", help="leave the plain loop out")
    parser.add_argument("--plain-loop", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_loop:
        plain_loop(*options.plain_loop)
        return
    source, output, copy = (options.directory / name for name in ("source", "output", "copy"))
    shutil.rmtree(options.directory, ignore_errors=True)
    make_source(source, options.gigabytes, options.shards)
    plan = plan_cast(source)
    cold = disk.drop_caches()
    print(f"{plan.count} tensors, {plan.read_size:,} bytes -> {plan.size:,}; cold caches: {cold}")

    def clear() -> None:
        shutil.rmtree(output, ignore_errors=True)

    ours = [sys.executable, "-m", "autodeco", "cast", "--device", options.device]
    ours += ["--input", str(source), "--output", str(output)]
    loop = [sys.executable, __file__, "--directory", "-", "--plain-loop", str(source), str(output)]
    casts, copies, loops = [], [], []
    for _ in range(options.runs):
        casts.append(disk.run_child(ours, clear))
        copies.append(disk.copy_seconds(output, copy))
        if not options.no_loop:
            loops.append(disk.run_child(loop, clear))
    size = plan.size
    seconds = [run.seconds for run in casts]
    print(disk.summary("cp --reflink=never", copies, size))
    print(disk.summary(f"autodeco cast ({options.device})", seconds, size))
    print(f"speed: {median(copies) / median(seconds):.2f} of cp's (goal 0.60)")
    largest = max(t.plan.tensors[n].size for t in plan.shards for n in t.plan.tensors)
    peak = max(run.peak for run in casts)
    print(f"peak memory {peak / 2**30:.2f} GiB; bound {1 + largest / 2**30:.2f} GiB")
    if loops:
        print(disk.summary("a loop over the tensors", [run.seconds for run in loops], size))
        print(f"peak memory of the loop {max(run.peak for run in loops) / 2**30:.2f} GiB")
    shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
