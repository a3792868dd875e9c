"""A dry run of a cluster job: every stage on eight ranks, with all kinds of parallelism but cp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_runs import metrics, only_run, run_well
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autodeco.heads.files import load_heads
from autodeco.run_directory import STAGES
from autodeco.stories import write_records

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(560)]

RANKS = 8
STEPS = 4
LAYOUT = "pp=2,ep=2"  # 4 copies of the model, 2 of each expert


def options(folder: Path, out: str, layout: str) -> list[str]:
    values = {
        "plugin": "qwen3",
        "preset": "debug-moe",
        "device": "cpu",
        "layout": layout,
        "task-samples": 64,
        "eval-data": folder / "held_out.jsonl",
        "global-batch": 8,
        "max-steps": STEPS,
        "save-every": 2,
        "eval-every": 2,
        "evaluate-problems": 2,
        "max-new-tokens": 4,
        "dist-timeout": 200,
        "out": folder / out,
    }
    return [str(part) for key, value in values.items() for part in (f"--{key}", value)]


def test_a_whole_run_on_eight_ranks(tmp_path: Path) -> None:
    write_records(tmp_path / "held_out.jsonl", 1, "heldout", 8)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [
            *launcher,
            f"--nproc-per-node={RANKS}",
            "-m",
            "autodeco",
            "run",
            *options(tmp_path, "runs", LAYOUT),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path / "runs")
    assert {path.stem for path in (run / "stages").iterdir()} == set(STAGES)
    manifest = json.loads((run / "stages" / "build.json").read_text())
    assert manifest["engine"] == "megatron"
    assert [row["step"] for row in metrics(tmp_path / "runs", "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in metrics(tmp_path / "runs", "eval")] == [0, 2, 4]
    run_well(["train", *options(tmp_path, "alone", "tp=1")], 1)
    losses, alone = (
        [row["loss"] for kind in ("train", "eval") for row in metrics(tmp_path / out, kind)]
        for out in ("runs", "alone")
    )
    assert losses == pytest.approx(alone, rel=1e-5, abs=0)
    logs = {f"rank-{rank}.log" for rank in range(RANKS)}
    assert {path.name for path in (run / "logs").iterdir()} == logs
    for log in logs:
        text = (run / "logs" / log).read_text()
        assert f"{log.removesuffix('.log').replace('-', ' ')}, host" in text
        assert "train ends" in text and "Traceback" not in text
    assert not [path for path in run.rglob("*") if ".partial" in path.name]

    assert len(list(run.rglob("heads/config.json"))) == 1, "one export"
    heads = load_heads(run / "heads").heads
    assert all(bool(p.isfinite().all()) for p in heads.parameters())
    base, merged = (load_file(run / name / "model.safetensors") for name in ("model", "merged"))
    assert all(torch.equal(base[name], merged[name]) for name in base)
    ids = torch.arange(12)[None]
    models = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("model", "merged")]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
    assert (run / "evaluation.json").exists() and (run / "report.html").exists()
