"""Data parallel training with two processes, and the lock that keeps others out of a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_tools import outcome, tiny_heads

from autodeco.errors import EnvironmentProblem, RunError
from autodeco.lock import LOCK_FILE, file_lock, run_lock
from autodeco.training.checkpoint import list_checkpoints, step_of
from autodeco.training.logging import METRICS, read_metrics

WORKER = Path(__file__).with_name("parallel_worker.py")
SECONDS = 240


def environment(**more: str) -> dict[str, str]:
    # gloo shall not look up the machine's name, which need not resolve
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def start(root: Path, rank: int, world: int, changes: Any, options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(root), json.dumps(changes), json.dumps(options)],
        env=environment(RANK=str(rank), WORLD_SIZE=str(world)),
        stderr=subprocess.PIPE,
        text=True,
    )


def train(root: Path, world: int, changes: dict[str, Any], **options: Any) -> list[Any]:
    """Trains in `world` processes; returns each rank's heads."""
    root.mkdir(exist_ok=True)
    options["meeting"] = f"meeting-{uuid.uuid4().hex}"
    ranks = [start(root, rank, world, changes, options) for rank in range(world)]
    for process in ranks:
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors
    return [load_file(root / f"heads{rank}.safetensors") for rank in range(world)]


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    root = tmp_path_factory.mktemp("single")
    return root, train(root, 1, {"drop": 0.3})[0]


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    root = tmp_path_factory.mktemp("double")
    return root, train(root, 2, {"drop": 0.3})


def test_two_processes_train_the_same_heads_as_one(
    single: tuple[Path, dict[str, Tensor]], double: tuple[Path, list[dict[str, Tensor]]]
) -> None:
    one, heads = single[1], double[1]
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, heads[1][name]), f"{name} differs between the ranks"
    assert_close(heads[0], one, 1e-6)
    begun = tiny_heads().state_dict()
    moved = max(float((begun[name] - one[name]).abs().max()) for name in begun)
    assert moved > 0.01


def test_only_the_first_process_writes(
    single: tuple[Path, dict[str, Tensor]], double: tuple[Path, list[dict[str, Tensor]]]
) -> None:
    root = double[0]
    assert list((root / "rank1").iterdir()) == []
    assert {p.name for p in (root / "rank0").iterdir()} == {METRICS, "checkpoints"}
    mine = outcome(root / "rank0")["metrics"]
    of_one = outcome(single[0] / "rank0")["metrics"]
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in of_one]
    for row, other in zip(mine, of_one, strict=True):  # sums over all ranks, not of one
        numbers = {k: v for k, v in other.items() if k != "kind"}
        assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)


def test_a_signal_to_the_second_process_stops_both_and_one_goes_on(
    tmp_path: Path, single: tuple[Path, dict[str, Tensor]]
) -> None:
    stopped = train(tmp_path, 2, {"drop": 0.3}, signal={"1": 4})
    assert [bool(heads["stopped"]) for heads in stopped] == [True, True]
    at = step_of(list_checkpoints(tmp_path / "rank0" / "checkpoints")[-1])
    assert 0 < at < 10
    (done,) = train(tmp_path, 1, {"drop": 0.3})
    assert not done["stopped"]
    assert_close(done, single[1], 1e-6)
    rows = [r for r in read_metrics(tmp_path / "rank0" / METRICS) if r["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 11))


def test_a_rank_without_a_sample_takes_part(tmp_path: Path) -> None:
    changes = {"global_batch": 1, "epochs": 1, "max_steps": 4}
    heads = train(tmp_path / "two", 2, changes)
    assert_close(heads[0], heads[1], 0)
    assert_close(heads[0], train(tmp_path / "one", 1, changes)[0], 1e-6)


@pytest.mark.slow
def test_a_whole_run_under_torchrun_prepares_its_inputs_once(tmp_path: Path) -> None:
    """Both ranks drew the built-in model, and the second rename failed."""
    options = ["--plugin", "qwen3", "--preset", "debug", "--task-samples", "16"]
    options += ["--max-steps", "2", "--eval-every", "100", "--evaluate-problems", "1"]
    options += ["--max-new-tokens", "2", "--global-batch", "4", "--device", "cpu"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    heads = []
    for name, prefix in (("two", launch), ("one", [])):
        command = [sys.executable, *prefix, "-m", "autodeco", "run", *options]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (run,) = (tmp_path / name).glob("*/*")
        assert (run / "stages" / "evaluate.json").exists()
        assert not list(run.rglob("*.partial"))
        heads.append(load_file(run / "heads" / "model.safetensors"))
    assert_close(heads[0], heads[1], 1e-6)


HOLDER = """
import sys, time
from pathlib import Path
from autodeco.lock import run_lock
lock = run_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with pytest.raises(RunError) as refused:
            run_lock(tmp_path)
        text = str(refused.value)
        assert f"process {holder.pid} on {socket.gethostname()}, since 20" in text
        assert str(tmp_path) in text and "--resume new" in text
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    lock = run_lock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    run_lock(tmp_path).release()


@pytest.mark.parametrize("content", ["", "no json", "[1]", '{"pid": 3}'])
def test_a_holder_without_a_name_is_another_process(tmp_path: Path, content: str) -> None:
    lock = run_lock(tmp_path)
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(RunError, match="in use by another process"):
        run_lock(tmp_path)
    lock.release()


def test_of_many_processes_one_gets_the_lock(tmp_path: Path) -> None:
    code = HOLDER.replace("time.sleep(600)", "sys.stdin.read()")
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    said = []
    for process in crowd:  # the holder says so and waits; the others end
        assert process.stdout is not None
        said.append(process.stdout.readline())
    errors = [process.communicate(timeout=60)[1] for process in crowd]
    assert sorted(said) == ["", "", "", "", "held\n"]
    assert sum("in use by" in text for text in errors) == 4


def test_a_lock_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentProblem, match="lock the run"):
        run_lock(tmp_path / "nowhere")
    original = Path.open

    class Full:
        """A file on a full disk: what stands in its buffer is refused, also when it is closed."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.stream.close()
            self.flush()

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(original(path, mode)))
    with pytest.raises(EnvironmentProblem, match="free some space") as problem:
        run_lock(tmp_path)
    assert str(tmp_path / LOCK_FILE) in str(problem.value)
    monkeypatch.undo()
    run_lock(tmp_path).release()


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opened the file before it was removed holds a lock that nobody else would meet."""
    path, plain = tmp_path / "import.lock", fcntl.flock
    held = file_lock(path, "the import", tmp_path, "wait")

    def ends_first(stream: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", plain)
        held.remove()
        plain(stream, how)

    monkeypatch.setattr(fcntl, "flock", ends_first)
    lock = file_lock(path, "the import", tmp_path, "wait")
    with pytest.raises(RunError, match="in use"):
        file_lock(path, "the import", tmp_path, "wait")
    lock.remove()
    assert not list(tmp_path.iterdir())
