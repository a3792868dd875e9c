"""A whole `autodeco run` at a real model's shape, killed and resumed once on the way.

    python benchmarks/real_shape.py --preset 0.6b --work /tmp/real_shape
    python benchmarks/real_shape.py --preset 0.6b --device cuda --samples 256 --work /tmp/real_shape

Builds a random checkpoint of the preset's shape with transformers (several shards), training data
of token ids over the whole vocabulary, then runs the command line as a user would. The first
process is killed (SIGKILL) as soon as the checkpoint of the second step stands; the second one
finishes. With `--ranks` the run is under torchrun and nothing is killed: its processes would live
on. Prints one JSON object: seconds a stage, tokens a second, and the peak memory of the processes
beside the size of the weights. The first steps of a process are cold and few are run here:
`training_step.py` is what measures an engine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autodeco import stories
from autodeco.convert.source import built_in_checkpoint
from autodeco.registry import Registry

PROMPT_TOKENS = 100
LOGIT_SPREAD = 5.0


def build_checkpoint(plugin: str, preset: str, directory: Path, device: str) -> int:
    """Saves a random bf16 model of the preset's shape; returns the bytes of its weights."""
    resolution = Registry().resolve(plugin, None, preset)
    family, chosen = resolution.family, resolution.preset
    demo = next(p for p in family.presets if p.checkpoint)
    if not (directory / "model.safetensors.index.json").exists():
        values = family.architecture(chosen.architecture).config_json(chosen.shape, chosen.config)
        values.pop("architectures", None)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        shard = "400MB" if chosen.shape.num_layers < 30 else "4GB"
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        # A fresh model's logits are flat (spread 0.6); a trained one's have a spread of 3 to 6.
        model.get_decoder().norm.weight.data.fill_(LOGIT_SPREAD / (0.02 * config.hidden_size**0.5))
        model.save_pretrained(directory, max_shard_size=shard)
        for path in built_in_checkpoint(family, demo, Path()).glob("tokenizer*"):
            (directory / path.name).write_bytes(path.read_bytes())
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def build_data(path: Path, samples: int, length: int, vocabulary: int) -> None:
    """Samples of about `length` tokens, ids drawn over the whole vocabulary."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(samples):
        ids = random.integers(0, vocabulary, int(length * random.uniform(0.9, 1.1))).tolist()
        rows.append({"inputs": {"p_ids": ids[:PROMPT_TOKENS], "r_ids": ids[PROMPT_TOKENS:]}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(options: argparse.Namespace) -> list[str]:
    """The command line of the run."""
    work = options.work
    values = {
        "plugin": options.plugin,
        "preset": options.preset,
        "model": work / "model",
        "data": work / "train.jsonl",
        "out": work / "runs",
        "problems": work / "problems.jsonl",
        "engine": options.engine,
        "device": options.device,
        "held-out": 0.1,
        "global-batch": options.global_batch,
        "micro-batch-tokens": options.micro_batch_tokens,
        "save-every": 1,
        "eval-every": 1000,
        "max-new-tokens": 8,
        "evaluate-problems": 2,
    }
    if options.layout:
        values["layout"] = options.layout
    line = [sys.executable, "-m"]
    if options.ranks > 1:
        line += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        line += ["-m"]
    line += ["autodeco", "run", "--json"]
    return line + [part for key, value in values.items() for part in (f"--{key}", str(value))]


def run(options: argparse.Namespace, kill_after_steps: int | None) -> tuple[str, dict[str, float]]:
    """One run; returns its standard output, its seconds and the peak memory of a process."""
    began = time.monotonic()
    log, told = options.work / "log.txt", options.work / "stdout.json"
    with log.open("ab") as errors, told.open("wb") as output:
        process = subprocess.Popen(command(options), stdout=output, stderr=errors)
    found = os.wait4(process.pid, os.WNOHANG)
    while not found[0]:
        steps = [
            int(p.name.split("-")[-2])
            for p in options.work.glob("runs/*/*/checkpoints/[!.]*")
            if p.is_dir()
        ]
        if kill_after_steps is not None and max(steps, default=0) >= kill_after_steps:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
        found = os.wait4(process.pid, os.WNOHANG)
    _, status, usage = found
    if status != (signal.SIGKILL if kill_after_steps is not None else 0):
        raise SystemExit(f"the run ended with status {status}: see {log}")
    return told.read_text(), {
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plugin", default="qwen3")
    parser.add_argument("--preset", default="0.6b")
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--global-batch", type=int, default=4)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--layout")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    size = build_checkpoint(options.plugin, options.preset, options.work / "model", options.device)
    config = json.loads((options.work / "model" / "config.json").read_text())
    build_data(options.work / "train.jsonl", options.samples, options.length, config["vocab_size"])
    stories.write_problems(options.work / "problems.jsonl", 0, count=2)
    killed = run(options, kill_after_steps=2)[1] if options.ranks == 1 else None
    output, finished = run(options, kill_after_steps=None)
    summary = json.loads(output)
    rows = (Path(summary["run"]) / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, rows) if row["kind"] == "train"]
    speed = statistics.median(row["tokens_per_second"] for row in steps)
    manifest = json.loads((Path(summary["run"]) / "stages" / "train.json").read_text())
    result = {
        "preset": options.preset,
        "vocab_size": config["vocab_size"],
        "shards": len(list((options.work / "model").glob("*.safetensors"))),
        "weights_gib": round(size / 2**30, 2),
        "samples": options.samples,
        "steps": [row["step"] for row in steps],
        "tokens_per_second": round(speed, 1),
        "tokens_per_second_each": [round(row["tokens_per_second"], 1) for row in steps],
        "stages": {row["stage"]: row["seconds"] for row in summary["stages"]},
        "killed": killed,
        "finished": finished,
        "peak_gpu_gib": round(manifest.get("peak_gpu_bytes", 0) / 2**30, 2),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
