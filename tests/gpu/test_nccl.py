"""Two GPUs, NCCL: every kind of parallelism and whole runs, against the hf engine on one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron_cases import TWO, Limits, check, launch, references, worst_loss
from rank_runs import only_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
CASES = (*TWO, ("debug", None), ("debug-moe", None))  # None: the hf engine, data parallel
SECONDS = 240


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, list[float]]]:
    """What two ranks make of all cases, and what one process of the hf engine makes."""
    place = tmp_path_factory.mktemp("nccl")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = references(place, "cuda:0")
    torch.cuda.empty_cache()
    reports = launch(place, 2, CASES, "nccl", "cuda")
    for report in reports:  # the figures of docs/support-matrix.md, shown by pytest -s
        worst = {key: report[key] for key in ("logits", "gradient", "moved")}
        print(report["preset"], report["layout"], worst, worst_loss(report, expected))
    return reports, expected


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{p}-{lay}" for p, lay in CASES])
def test_two_gpus_give_the_logits_and_the_heads_of_one(
    found: tuple[list[Any], dict[str, list[float]]], number: int
) -> None:
    # the CPU's limits; two H100 came within 5e-6, 1.4e-6 (loss), 1.3e-7 (gradient), 2.3e-4 (moved)
    check(found[0][number], found[1], Limits())


def on_two_gpus(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs `autodeco` under torchrun."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return subprocess.run(
        [*launcher, "2", "-m", "autodeco", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    ("engine", "preset", "layout"),
    [
        ("megatron", "debug-moe", "ep=2"),
        ("megatron", "debug", "pp=2,first=2,last=1"),
        ("megatron", "debug", "tp=2"),
        ("hf", "debug", "tp=1"),
    ],
)
def test_a_whole_run(tmp_path: Path, engine: str, preset: str, layout: str) -> None:
    values = {
        "plugin": "qwen3",
        "preset": preset,
        "engine": engine,
        "layout": layout,
        "device": "cuda",
        "dtype": "bfloat16",
        "task-samples": 64,
        "global-batch": 8,
        "max-steps": 4,
        "save-every": 2,
        "eval-every": 2,
        "evaluate-problems": 2,
        "max-new-tokens": 8,
        "dist-timeout": 100,
        "out": tmp_path / "runs",
    }
    options = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    done = on_two_gpus(tmp_path, ["run", *options])
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    run = only_run(tmp_path / "runs")
    assert (run / "stages" / "evaluate.json").exists()
    assert "never run by us" not in done.stderr


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_doctor(tmp_path: Path, layout: str) -> None:
    options = ["--distributed", "--plugin", "qwen3", "--device", "cuda", "--layout", layout]
    done = on_two_gpus(tmp_path, ["doctor", *options, "--json"])
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    told = json.loads(done.stdout)
    rows = {row["name"]: row["found"] for row in told["rows"]}
    print(json.dumps(rows))
    assert told["ok"] and "nccl, 2 ranks" in rows["process group"], rows
    assert f"megatron engine at {layout}, float32 on cuda" in rows["debug model"]
