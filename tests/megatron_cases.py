"""The layouts that the megatron engine is tried at, and how their ranks are started and judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron_worker import STEPS, job_of, losses, trained

from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.engines.hf import HFEngine
from autodeco_plugin_qwen3.family import FAMILY

WORKER = Path(__file__).with_name("megatron_worker.py")
ALONE = (("debug", "tp=1"), ("debug-moe", "tp=1"))
TWO = (
    ("debug", "tp=2"),
    ("debug", "pp=2,first=2,last=1"),
    ("debug-moe", "ep=2"),
    ("debug", "tp=1"),  # two copies of the model: data parallel
    ("debug-moe", "tp=2"),
    ("debug-moe", "pp=2"),
    ("debug", "cp=2"),
    ("debug-moe", "cp=2"),
)
FOUR = (
    ("debug", "tp=2,cp=2"),
    ("debug", "cp=4"),
    ("debug", "pp=2,cp=2,first=2"),
    ("debug-moe", "ep=2,cp=2"),
    ("debug", "tp=2,pp=2,first=1,last=2"),
    ("debug-moe", "tp=2,ep=2"),
    ("debug-moe", "pp=2,ep=2"),
    ("debug", "tp=2"),
    ("debug", "pp=2,first=2"),
    ("debug-moe", "ep=2"),
    ("debug-moe", "ep=4"),
)
EIGHT = (("debug-moe", "tp=2,pp=2,ep=2"), ("debug-moe", "pp=2,ep=2"), ("debug", "tp=2,pp=2,last=1"))


@dataclass(frozen=True)
class Limits:
    """How far a case may be from the hf engine in one process.

    Attributes:
        logits: Largest absolute difference.
        loss: Largest absolute difference of the losses of all steps.
        gradient: Of the first step, relative, in norm.
        moved: How far the heads went in all steps, relative, in norm.
    """

    logits: float = 5e-5
    loss: float = 1e-5
    gradient: float = 1e-5
    moved: float = 1e-2


def references(place: Path, device: str) -> dict[str, list[float]]:
    """Writes checkpoints and what the hf engine makes of them in one process.

    Returns:
        The losses of each preset.
    """
    found = {}
    for preset in ("debug", "debug-moe"):
        model = write_random_checkpoint(FAMILY, FAMILY.preset(preset), place / preset)
        engine = HFEngine(model, torch.device(device), torch.float32)
        job = job_of(model, preset, None, device=device)
        torch.save(trained(job, engine, place / f"hf-{preset}"), place / f"{preset}.pt")
        found[preset] = losses(place / f"hf-{preset}")
    return found


def launch(root: Path, world: int, cases: Any, name: str, device: str) -> list[dict[str, Any]]:
    """Runs cases on some ranks of this machine; returns what rank 0 reports of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(root), json.dumps(cases), name, device],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * world, errors[next(i for i, c in enumerate(codes) if c)][-3000:]
    reports: list[dict[str, Any]] = json.loads((root / f"{name}.json").read_text())
    return reports


def check(report: dict[str, Any], expected: dict[str, list[float]], limits: Limits) -> None:
    """Judges one case."""
    who = f"{report['preset']} {report['layout']}"
    assert report["logits"] < limits.logits, f"{who}: {report['logits']}"
    assert report["same"], f"{who}: the ranks hold other heads"
    assert len(report["losses"]) == STEPS
    worst = worst_loss(report, expected)
    assert worst < limits.loss, f"{who}: losses differ by {worst}"
    assert report["gradient"] < limits.gradient, f"{who}: {report['gradient']}"
    assert report["moved"] < limits.moved, f"{who}: {report['moved']}"


def worst_loss(report: dict[str, Any], expected: dict[str, list[float]]) -> float:
    """Returns the largest difference of the losses of all steps."""
    pairs = zip(report["losses"], expected[report["preset"]], strict=True)
    return max(abs(a - b) for a, b in pairs)
