"""Plans cast, import and merge of a full-size model from headers alone, on sparse files.

    python benchmarks/dry_run.py --directory DISK/bench

Names, shapes, dtypes and storage format of DeepSeek-V3.1 as published (another with --plugin and
--preset), 163 files of headers with holes behind them. The goal: under a minute.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import disk
import synthetic
import torch

from autodeco.heads.files import save_heads
from autodeco.heads.identity import base_identity
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.registry import Registry


def main() -> None:
    """Runs the three commands, each in a process of its own, with cold caches."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--plugin", default="deepseek_v3")
    parser.add_argument("--preset", default="v3.1-terminus")
    parser.add_argument("--shards", type=int, default=163)
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    plugin = Registry().get(options.plugin).plugin
    assert plugin is not None
    preset = plugin.family.preset(options.preset)
    source, heads = options.directory / "source", options.directory / "heads"
    synthetic.write(plugin.family, preset, source, options.shards, sparse=True)
    identity = base_identity(source)
    torch.manual_seed(0)
    save_heads(heads, DecodingHeads(HeadsConfig(identity["hidden_size"])), metadata=identity)
    print(f"{disk.files_size(source):,} bytes in {options.shards} files, nearly all of them holes")
    output = ["--output", str(options.directory / "output"), "--dry-run"]
    commands = {
        "cast": ["--input", str(source)],
        "import": ["--model", str(source), "--format", "torch_dist"],
        "merge": ["--model", str(source), "--heads-dir", str(heads)],
    }
    total = 0.0
    for name, arguments in commands.items():
        command = [sys.executable, "-W", "ignore", "-m", "autodeco", name, *arguments, *output]
        run = disk.run_child(command, lambda: None)
        total += run.seconds
        print(f"{name:8} {run.seconds:6.1f} s, peak memory {run.peak / 2**30:.2f} GiB")
    print(f"together {total:6.1f} s (goal: 60)")
    shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
