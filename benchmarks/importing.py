"""Imports a synthetic mixture of experts and exports it again, beside cp, and transformers.

    python benchmarks/importing.py --directory DISK/bench --layers 8

Names, shapes and dtypes of Qwen3-30B-A3B with so many layers (8: 11 GB). All in turn, caches
dropped before each, fsync inside each timing, the median of three. The goal of the import: at
least half the speed of ``cp --reflink=never``, anonymous memory under 2 GiB + the three largest
source tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from statistics import median

import disk
import synthetic

from autodeco.registry import Registry
from autodeco.safetensors_header import read_checkpoint


def through_transformers(source: Path, output: Path) -> None:
    """Loads the model and saves it, as a conversion by hand begins and ends."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(output)
    disk.sync_files(output)


def main() -> None:
    """Measures, or goes through transformers in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--plugin", default="qwen3")
    parser.add_argument("--preset", default="30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="once, beside the others")
    parser.add_argument("--through", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.through:
        through_transformers(*options.through)
        return
    names = ("source", "output", "copy", "exported")
    source, output, copy, exported = (options.directory / name for name in names)
    shutil.rmtree(options.directory, ignore_errors=True)
    plugin = Registry().get(options.plugin).plugin
    assert plugin is not None
    family = plugin.family
    preset = family.preset(options.preset)
    shape = dataclasses.replace(preset.shape, num_layers=options.layers)
    preset = dataclasses.replace(preset, shape=shape)
    synthetic.write(family, preset, source, options.shards, sparse=False)
    size = disk.files_size(source)
    print(f"{size:,} bytes; cold caches: {disk.drop_caches()}")

    def clear() -> None:
        shutil.rmtree(output, ignore_errors=True)

    ours = [sys.executable, "-m", "autodeco", "import", "--plugin", options.plugin]
    ours += ["--preset", "auto", "--model", str(source), "--format", "torch_dist"]
    ours += ["--output", str(output)]
    back = [sys.executable, "-m", "autodeco", "export", "--target", "hf", "--preset", "auto"]
    back += ["--plugin", options.plugin, "--input", str(output), "--output", str(exported)]
    imports, exports, copies = [], [], []
    for _ in range(options.runs):
        imports.append(disk.run_child(ours, clear))
        exports.append(disk.run_child(back, lambda: None))
        shutil.rmtree(exported)
        clear()
        copies.append(disk.copy_seconds(source, copy))
    seconds = [run.seconds for run in imports]
    print(disk.summary("cp --reflink=never", copies, size))
    print(disk.summary("autodeco import", seconds, size))
    print(f"speed: {median(copies) / median(seconds):.2f} of cp's (goal 0.50)")
    largest = sorted((info.size for info in read_checkpoint(source).values()), reverse=True)[:3]
    peak = max(run.peak_anonymous for run in imports)
    print(f"anonymous {peak / 2**30:.2f} GiB; bound {2 + sum(largest) / 2**30:.2f} GiB")
    back_seconds = [run.seconds for run in exports]
    print(disk.summary("autodeco export --target hf", back_seconds, size))
    print(f"speed: {median(copies) / median(back_seconds):.2f} of cp's")
    print(f"anonymous {max(run.peak_anonymous for run in exports) / 2**30:.2f} GiB")
    if options.transformers:
        through = [sys.executable, __file__, "--directory", "-", "--through"]
        other = disk.run_child([*through, str(source), str(output)], clear)
        print(disk.summary("through transformers", [other.seconds], size))
        print(f"its anonymous memory {other.peak_anonymous / 2**30:.2f} GiB")
    shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
