"""Ending early with a checkpoint: SIGTERM, SIGUSR1, the time limit; and what goes on after it."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from training_tools import TinyEngine, outcome, run_training, tiny_heads, tiny_job

from autodeco import pipeline, stopping
from autodeco.cli import main
from autodeco.errors import EnvironmentProblem, StoppedEarly, UsageError
from autodeco.job import Job
from autodeco.job_values import coerce_values
from autodeco.processes import seconds_since_start
from autodeco.stopping import Stop, StopWatch, parse_duration, stop_at_once
from autodeco.stories import write_records
from autodeco.training.checkpoint import list_checkpoints, step_of
from autodeco.training.logging import MetricsLog

TINY = ("--plugin", "qwen3", "--preset", "debug", "--task-samples", "16", "--max-steps", "3")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("90m", 5400), ("5400", 5400), ("45s", 45), ("1d2h", 93600), ("1m5", 65)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert coerce_values({"time_limit": text}, where="here") == {"time_limit": text}


@pytest.mark.parametrize("text", ["", "0", "soon", "3:50", "-5", "1.5h", "5m3h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration"):
        coerce_values({"time_limit": text}, where="here")


def test_neither_the_limit_nor_the_timeout_changes_the_result() -> None:
    assert not {"time_limit", "dist_timeout"} & set(Job().result_values())


def test_the_time_counts_from_the_start_of_the_process() -> None:
    before = seconds_since_start()
    assert 0.05 < before < 86400
    time.sleep(0.1)
    assert 0.1 <= seconds_since_start() - before < 5


def test_room_is_left_for_the_slowest_step_and_the_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(stopping, "seconds_since_start", lambda: clock["now"])
    watch = StopWatch("100")
    for what, seconds in (("step", 20), ("step", 5), ("evaluation", 7), ("checkpoint", 4)):
        with watch.timed(what):
            clock["now"] += seconds
    room = 20 + 7 + 4 + 4
    clock["now"] = 100.0 - room
    assert watch.wanted() == Stop.NO
    clock["now"] += 0.1
    assert watch.wanted() == Stop.EARLY
    assert StopWatch(None).wanted() == Stop.NO


class StopAt(TinyEngine):
    def __init__(self, batch: int, number: signal.Signals) -> None:
        super().__init__()
        self.left, self.number = batch, number

    def hidden_states(self, batches: Any) -> Any:
        for hidden in super().hidden_states(batches):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
            yield hidden


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedEarly, match="with a checkpoint") as stopped:
        run_training(tmp_path / "cut", tiny_job(), engine=StopAt(9, number))
    assert stopped.value.agreed and signal.getsignal(number) == before
    assert step_of(list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]) < 10
    run_training(tmp_path / "cut", tiny_job(), heads=tiny_heads(seed=4))
    run_training(tmp_path / "whole", tiny_job())
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_every_start_within_a_time_limit_makes_a_step(tmp_path: Path) -> None:
    """Otherwise a queue would start a run for ever that never moves."""
    for step in (1, 2, 3):
        with pytest.raises(StoppedEarly):
            run_training(tmp_path / "cut", tiny_job(time_limit="1s"))  # it is over already
        assert step_of(list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]) == step
    run_training(tmp_path / "cut", tiny_job())
    run_training(tmp_path / "whole", tiny_job())
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_outside_the_training_a_signal_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(StoppedEarly, match="SIGUSR1 came"), stop_at_once():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_exit_code_is_75_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    write_records(held_out, 1, "heldout", 4)
    runs = tmp_path / "runs"
    command = ["train", *TINY, "--device", "cpu", "--out", str(runs), "--eval-data", str(held_out)]
    for step in (1, 2):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--time-limit", "1s"])
        assert ended.value.code == 75
        said = capsys.readouterr().err
        assert f"stopped early: at step {step}/3, with a checkpoint" in said
        assert "run the same command again" in said and "error" not in said
    main(command)
    (run,) = runs.glob("*/*")  # one run, continued
    assert step_of(list_checkpoints(run / "checkpoints")[-1]) == 3
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.count("stopped: at step") == 2 and log.count("begin: rank 0") == 3
    assert "train begins" in log and "train ends after" in log


@pytest.mark.parametrize("raised", [StoppedEarly("SIGTERM came"), StoppedEarly("x", agreed=True)])
def test_a_stop_is_no_error(
    raised: StoppedEarly, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(pipeline, "run_job", stop)
    with pytest.raises(SystemExit) as ended:
        main(["run", *TINY])
    assert ended.value.code == 75
    assert capsys.readouterr().err == f"stopped early: {raised}; run the same command again\n"


class FakeWandb(types.ModuleType):
    """What of wandb we call."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.fails: Exception | None = None

    def init(self, **options: Any) -> FakeWandb:
        if self.fails is not None:
            raise self.fails
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_a_resumed_run_keeps_its_id_at_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    first = tmp_path / "a run#1" / "20260101-000000"
    first.mkdir(parents=True)
    log = MetricsLog(first, None, "wandb", {"seed": 1})
    log.write("train", 1, {"loss": 0.5})
    log.close()
    moved = tmp_path / "elsewhere"
    first.rename(moved)
    MetricsLog(moved, 1, "wandb", {"seed": 1}).close()
    ids = [options["id"] for options in wandb.begun]
    assert ids == ["a-run-1-20260101-000000"] * 2
    assert all(options["resume"] == "allow" for options in wandb.begun)
    assert wandb.logged == [(1, {"train/loss": 0.5})] and wandb.finished == 2
    wandb.fails = ConnectionError("no network")
    with pytest.raises(EnvironmentProblem, match=r"no network[\s\S]*WANDB_MODE=offline"):
        MetricsLog(moved, 1, "wandb", {})
