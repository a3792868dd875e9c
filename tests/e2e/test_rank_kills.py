"""Runs on two ranks of which one is killed: the other ends, and the run goes on as if unhurt."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from crash_tools import outcome
from rank_runs import Ranks, run_well

from autodeco.stories import write_records

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(560)]

LAYOUTS = {"hf": "tp=1", "megatron": "tp=2"}
SIGKILLED = -9
# Stage -> what is there when it has begun.
MOMENTS = {
    "build": "stages/import.json",
    "train": "checkpoints/*-2-*",
    "evaluate": "stages/merge.json",
}
Undisturbed = dict[str, dict[str, Any]]


def arguments(folder: Path, engine: str, out: str) -> list[str]:
    values = {
        "plugin": "qwen3",
        "preset": "debug",
        "device": "cpu",
        "engine": engine,
        "layout": LAYOUTS[engine],
        "task-samples": 64,
        "eval-data": folder / "held_out.jsonl",
        "global-batch": 4,
        "max-steps": 12,
        "save-every": 1,
        "eval-every": 4,
        "evaluate-problems": 4,
        "max-new-tokens": 16,
        "dist-timeout": 20,
        "out": folder / out,
    }
    return ["run", *(str(part) for key, value in values.items() for part in (f"--{key}", value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module are, and the data that they share."""
    path = tmp_path_factory.mktemp("kills")
    write_records(path / "held_out.jsonl", 1, "heldout", 4)
    return path


@pytest.fixture(scope="module")
def undisturbed() -> Undisturbed:
    """Outcomes of runs that nobody killed, by engine; made when they are first needed."""
    return {}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("engine", "stage"), [("hf", "build"), ("hf", "train"), ("megatron", "train")]
)
def test_the_other_rank_ends_and_names_the_killed_one_and_the_run_goes_on(
    folder: Path, undisturbed: Undisturbed, engine: str, stage: str, victim: int
) -> None:
    out = f"{engine}-{stage}-{victim}"
    with kill(folder, engine, out, stage, victim) as ranks:
        code, said = ranks.ended(1 - victim)
    assert code == 7, said
    host = socket.gethostname()
    assert f"rank {victim} on host {host}" in said and f"rank {1 - victim} on" not in said
    assert_goes_on(folder, undisturbed, engine, out)


def test_rank_0_is_killed_when_the_others_have_ended(
    folder: Path, undisturbed: Undisturbed
) -> None:
    with kill(folder, "hf", "hf-evaluate", "evaluate", 0) as ranks:
        code, said = ranks.ended(1)
    assert code == 0, said  # its work was done with the training
    assert_goes_on(folder, undisturbed, "hf", "hf-evaluate")


def kill(folder: Path, engine: str, out: str, stage: str, victim: int) -> Ranks:
    """Starts a run and kills a rank in a stage, which it does not finish."""
    ranks = Ranks(arguments(folder, engine, out), 2)
    try:
        ranks.send_when(
            lambda: any((folder / out).glob(f"*/*/{MOMENTS[stage]}")), victim, signal.SIGKILL
        )
        assert ranks.ended(victim)[0] == SIGKILLED
        assert not list((folder / out).glob(f"*/*/stages/{stage}.json"))
    except BaseException:
        ranks.__exit__(None, None, None)
        raise
    return ranks


def assert_goes_on(folder: Path, undisturbed: Undisturbed, engine: str, out: str) -> None:
    """The same command finishes the run, with files (the heads too) equal byte for byte."""
    run_well(arguments(folder, engine, out), 2)
    if engine not in undisturbed:
        run_well(arguments(folder, engine, f"{engine}-whole"), 2)
        undisturbed[engine] = outcome(folder / f"{engine}-whole")
    whole, found = undisturbed[engine], outcome(folder / out)
    assert any(name.startswith("heads/") for name in whole["files"])
    assert found == whole
