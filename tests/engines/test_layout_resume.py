"""A run begun at one layout goes on at another, and its losses are those of one rank."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from rank_runs import Ranks, metrics, only_run, run_well

from autodeco.stories import write_records

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

STEPS = 10
# The loss of the top-p head jumps a little where two tokens, almost equally likely, swap places.
SAME = {"loss": (1e-5, 0.0), "temperature_loss": (0.0, 1e-6)}  # relative, absolute


def arguments(folder: Path, name: str, preset: str, layout: str) -> list[str]:
    options = {
        "plugin": "qwen3",
        "preset": preset,
        "device": "cpu",
        "engine": "megatron",
        "layout": layout,
        "save-every": 1,
        "eval-every": 5,
        "task-samples": 64,
        "max-steps": STEPS,
        "global-batch": 4,
        "eval-data": folder / "held_out.jsonl",
        "dist-timeout": 60,
        "out": folder / name,
    }
    return ["train", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]


@pytest.mark.parametrize(
    ("preset", "first", "second"),
    [
        ("debug", "tp=2", "pp=2,first=1"),
        pytest.param("debug-moe", "tp=2,ep=2", "pp=2", marks=pytest.mark.slow),
    ],
)
def test_a_run_begun_at_one_layout_goes_on_at_another_with_the_same_losses(
    tmp_path: Path, preset: str, first: str, second: str
) -> None:
    write_records(tmp_path / "held_out.jsonl", 1, "heldout", 4)
    run_well(arguments(tmp_path, "whole", preset, "tp=1"), 1)
    with Ranks(arguments(tmp_path, "moved", preset, first), 2) as ranks:
        ranks.send_when(
            lambda: any((tmp_path / "moved").glob("*/*/checkpoints/*-3-*")), 1, signal.SIGUSR1
        )
        ended = ranks.all_ended()
    assert [code for code, _ in ended] == [75, 75], ended
    done = len(metrics(tmp_path / "moved", "train"))
    assert 3 <= done < STEPS, "stopped on the way"
    run = only_run(tmp_path / "moved")
    run_well(arguments(tmp_path, "moved", preset, second), 2)
    assert only_run(tmp_path / "moved") == run
    for kind, steps in (("train", range(1, STEPS + 1)), ("eval", (0, 5, STEPS))):
        rows, alone = (metrics(tmp_path / name, kind) for name in ("moved", "whole"))
        assert [row["step"] for row in rows] == [row["step"] for row in alone] == list(steps)
        for name, (relative, absolute) in SAME.items():
            found, expected = ([row[name] for row in those] for those in (rows, alone))
            assert found == pytest.approx(expected, relative, absolute), (kind, name)
