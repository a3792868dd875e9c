"""The objective with its vocabulary split over tensor ranks, against the whole vocabulary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autodeco.engines.base import OutputWeight
from autodeco.heads.vocabulary import Vocabulary

WORKER = Path(__file__).with_name("split_worker.py")


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_split_vocabulary_gives_the_same_sums_and_gradients(tmp_path: Path, ranks: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(tmp_path / "meeting"), str(rank), str(ranks)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [p.returncode for p in processes] == [0] * ranks, outputs[0][1]
    report = json.loads(outputs[0][0].splitlines()[-1])
    assert len(report) == 12
    for case, found in report.items():
        assert found["same"], f"{case}: the ranks have other bits"
        assert found["gradient"] < 1e-5, case
        assert found["split"] == pytest.approx(found["sums"], rel=1e-5, abs=1e-6), case
        assert found["sums"]["normalizer"] > 0


def test_rows_that_do_not_make_up_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="do not make up the 10 rows"):
        Vocabulary.of(OutputWeight(torch.zeros(5, 2), 5, 10))
