"""The megatron engine under every kind of parallelism, against transformers and the hf engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron_cases import ALONE, EIGHT, FOUR, TWO, WORKER, Limits, check, launch, references
from megatron_worker import STEPS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints, and what the hf engine makes of them in one process."""
    place = tmp_path_factory.mktemp("megatron")
    return place, references(place, "cpu")


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
    for report in launch(root[0], world, cases, f"world-{world}", "cpu"):
        check(report, root[1], Limits())


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
