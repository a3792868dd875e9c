"""The megatron engine under every kind of parallelism, against transformers and the hf engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints, and what the hf engine makes of them in one process."""
    place = tmp_path_factory.mktemp("megatron")
    found = {}
    for preset in ("debug", "debug-moe"):
        model = write_random_checkpoint(FAMILY, FAMILY.preset(preset), place / preset)
        engine = HFEngine(model, torch.device("cpu"), torch.float32)
        torch.save(
            trained(job_of(model, preset, None), engine, place / f"hf-{preset}"),
            place / f"{preset}.pt",
        )
        found[preset] = losses(place / f"hf-{preset}")
    return place, found


def launch(root: Path, world: int, cases: Any, name: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(root), json.dumps(cases), name],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * world, errors[next(i for i, c in enumerate(codes) if c)][-3000:]
    reports: list[dict[str, Any]] = json.loads((root / f"{name}.json").read_text())
    return reports


def check(reports: list[dict[str, Any]], expected: dict[str, list[float]]) -> None:
    for report in reports:
        who = f"{report['preset']} {report['layout']}"
        assert report["logits"] < 5e-5, who
        assert report["same"], f"{who}: the ranks hold other heads"
        assert len(report["losses"]) == STEPS
        worst = max(
            abs(a - b) for a, b in zip(report["losses"], expected[report["preset"]], strict=True)
        )
        assert worst < 1e-5, f"{who}: losses differ by {worst}"
        assert report["gradient"] < 1e-5, who
        assert report["moved"] < 1e-2, who


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, ALONE),
        (2, TWO),
        pytest.param(4, FOUR, marks=pytest.mark.slow),
        pytest.param(8, EIGHT, marks=pytest.mark.slow),
    ],
)
def test_every_layout_gives_the_logits_and_the_heads_of_the_hf_engine(
    root: tuple[Path, dict[str, list[float]]], world: int, cases: Any
) -> None:
    check(launch(root[0], world, cases, f"world-{world}"), root[1])


@pytest.mark.parametrize("preset", ["debug", "debug-moe"])
def test_packed_and_padded_batches_give_the_same_losses(
    root: tuple[Path, dict[str, list[float]]], tmp_path: Path, preset: str
) -> None:
    """Packing is the default, and that of all cases above; here it is off."""
    code = (
        "import sys, json, warnings; warnings.simplefilter('ignore'); import torch; "
        "torch.set_num_threads(1); from pathlib import Path; "
        f"sys.path.insert(0, {str(WORKER.parent)!r}); import megatron_worker as w; "
        "model, preset, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]); "
        "job = w.job_of(model, preset, 'tp=1', packing=False); "
        "engine = w.build_engine(job, w.open_source(w.FAMILY, job), w.FAMILY); "
        "assert not engine.packs; w.trained(job, engine, out); print(json.dumps(w.losses(out)))"
    )
    command = [sys.executable, "-c", code, str(root[0] / preset), preset, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    padded = json.loads(done.stdout.splitlines()[-1])
    assert len(padded) == STEPS
    assert padded == pytest.approx(root[1][preset], rel=0, abs=1e-5)
