"""Merges heads into a checkpoint of many shards, and proves that no block of them was written.

    python benchmarks/merge.py --work /tmp/merge
    python benchmarks/merge.py --work /tmp/merge --shard-gib 5 --copied 2 --layouts native,autodeco

Makes shards with the headers of a real model (names, shapes and dtypes of a mixture of experts)
and holes for data, so that 60 shards of any size fit on any disk. Merges natively, through the
function and through the command line, and looks at what a write would leave behind: each shard's
inode, blocks and times, and what the kernel counts as written by this process. Beside it, in the
same run, a few shards with real blocks go through `cp --reflink=never` and, where asked, through
the `autodeco` layout, fsync inside both timings. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autodeco.heads.files import save_heads
from autodeco.heads.identity import base_identity
from autodeco.heads.merge import merge, split
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.safetensors_header import INDEX

HIDDEN, WIDTH = 7168, 2048
REPEATS = 3


def header_of(shard: int, tensors: int, size: int) -> dict[str, Any]:
    """A header of experts' matrices, with one tensor more that fills the file to its size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, matrix = 0, HIDDEN * WIDTH
    parts = ("down_proj", "gate_proj", "up_proj")
    for number in range(tensors):
        expert, part = divmod(number, len(parts))
        shape = [HIDDEN, WIDTH] if part == 0 else [WIDTH, HIDDEN]
        if end + matrix > size:
            shape = [0, HIDDEN]  # the file is too small for all of them
        count = shape[0] * shape[1]
        name = f"model.layers.{shard}.mlp.experts.{expert}.{parts[part]}.weight"
        entries[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + count]}
        end += count
    name = f"model.layers.{shard}.rest.weight"
    entries[name] = {"dtype": "U8", "shape": [size - end], "data_offsets": [end, size]}
    return entries


def make_base(directory: Path, shards: int, tensors: int, size: int, *, holes: bool) -> None:
    """A checkpoint of `shards` shards with `size` bytes of data each."""
    directory.mkdir(parents=True)
    table: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        entries = header_of(shard, tensors, size)
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            if not holes:
                block = os.urandom(8 << 20)
                for at in range(0, size, len(block)):
                    stream.write(block[: min(len(block), size - at)])
            stream.truncate(8 + len(text) + size)
            os.fsync(stream.fileno())
        table |= {key: name for key in entries if key != "__metadata__"}
    index = {"metadata": {"total_size": shards * size}, "weight_map": table}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = {"model_type": "benchmark", "hidden_size": HIDDEN, "vocab_size": 129280}
    (directory / "config.json").write_text(json.dumps(config))
    os.sync()


def make_heads(directory: Path, base: Path) -> Path:
    """Heads of the base's size."""
    heads = DecodingHeads(HeadsConfig(HIDDEN), torch.Generator().manual_seed(0))
    return save_heads(directory, heads, metadata=base_identity(base))


def shard_state(base: Path) -> dict[str, tuple[int, ...]]:
    """What a write to a shard would change: inode, blocks, size and the time of the content."""
    return {
        path.name: (status.st_ino, status.st_blocks, status.st_size, status.st_mtime_ns)
        for path in sorted(base.glob("*.safetensors"))
        for status in (path.stat(),)
    }


def written_bytes() -> int:
    """What this process has caused to be written to disks so far, as the kernel counts it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def native(base: Path, heads: Path, work: Path) -> dict[str, Any]:
    """The native merge, in this process and as a command."""
    before, seconds, processor, written = shard_state(base), [], [], []
    for repeat in range(REPEATS):
        output, count, used = work / f"native-{repeat}", written_bytes(), time.process_time()
        seconds.append(timed(lambda output=output: merge(base, heads, output)))  # type: ignore[misc]
        processor.append(time.process_time() - used)
        written.append(written_bytes() - count)
        shared = all((base / name).samefile(output / name) for name in before)
        shutil.rmtree(output)
    line = [sys.executable, "-m", "autodeco", "merge", "--model", str(base)]
    line += ["--heads-dir", str(heads), "--output", str(work / "command")]
    whole = timed(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))
    return {
        "seconds": round(statistics.median(seconds), 3),
        "processor_seconds": round(statistics.median(processor), 3),
        "seconds_of_the_command": round(whole, 3),
        "bytes_written": int(statistics.median(written)),
        "shards_are_the_same_files": shared,
        "shards_untouched": shard_state(base) == before,
    }


def copied(work: Path, shards: int, size: int, tensors: int, layouts: list[str]) -> dict[str, Any]:
    """Real blocks: `cp`, and the layout that writes them anew."""
    base = work / "blocks"
    make_base(base, shards, tensors, size, holes=False)
    heads = make_heads(work / "blocks-heads", base)
    files = sorted(base.glob("*.safetensors"))

    def cp() -> None:
        target = work / "cp"
        target.mkdir()
        subprocess.run(["cp", "--reflink=never", *map(str, files), str(target)], check=True)
        subprocess.run(["sync", *(str(target / file.name) for file in files)], check=True)

    ways: dict[str, Callable[[], object]] = {"cp": cp}
    if "autodeco" in layouts:
        ways["autodeco"] = lambda: merge(base, heads, work / "autodeco", layout="autodeco")
        ways["native --copy"] = lambda: merge(base, heads, work / "native --copy", copy=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, act in ways.items():
            seconds[name].append(timed(act))
            if name == "autodeco":
                split(work / name, work / "back-heads", base=work / "back")
                same = all((work / "back" / f.name).read_bytes() == f.read_bytes() for f in files)
                assert same, "the split does not give the shards back"
                shutil.rmtree(work / "back")
                shutil.rmtree(work / "back-heads")
            shutil.rmtree(work / name)
            os.sync()
    total = sum(file.stat().st_size for file in files)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "gib": round(total / 2**30, 2),
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "mib_per_second": {name: round(total / 2**20 / v) for name, v in medians.items()},
        "speed_of_cp": {name: round(medians["cp"] / v, 2) for name, v in medians.items()},
        "cp_seconds_per_gib": round(medians["cp"] / (total / 2**30), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--shard-gib", type=float, default=4.3)
    parser.add_argument("--tensors", type=int, default=1500, help="in each shard")
    parser.add_argument("--copied", type=int, default=2, help="shards with real blocks")
    parser.add_argument("--copied-gib", type=float, default=1.0, help="of each of these")
    parser.add_argument("--layouts", default="native", help="native, or native,autodeco")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    size = int(options.shard_gib * 2**30) // 8 * 8
    make_base(work / "base", options.shards, options.tensors, size, holes=True)
    heads = make_heads(work / "heads", work / "base")
    merged = native(work / "base", heads, work)
    blocks = copied(
        work,
        options.copied,
        int(options.copied_gib * 2**30) // 8 * 8,
        options.tensors,
        options.layouts.split(","),
    )
    all_by_cp = blocks["cp_seconds_per_gib"] * options.shards * options.shard_gib
    result = {
        "shards": options.shards,
        "gib": round(options.shards * size / 2**30, 1),
        "tensors": options.shards * (options.tensors + 1),
        "native": merged,
        "blocks": blocks,
        "cp_of_all_would_take_seconds": round(all_by_cp),
        "times_faster_than_cp": round(all_by_cp / merged["seconds"]),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
