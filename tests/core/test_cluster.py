"""Ranks that die, hang, fail or see other files: named with rank and host, and nobody waits."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autodeco.cluster.log import rank_log
from autodeco.errors import DataError
from autodeco.stories import write_records
from autodeco.training.logging import METRICS, read_metrics

WORKER = Path(__file__).with_name("cluster_worker.py")
HOST = socket.gethostname()
SECONDS = 120


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **address}
    return [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


class Ranks:
    """Two processes that meet; rank 0 has the store."""

    def __init__(
        self, what: str, shared: Path, own: tuple[str, str] = ("", ""), timeout: float = 4
    ):
        worker = [sys.executable, str(WORKER), what, str(shared)]
        self.shared = shared
        self.processes = start([[*worker, str(shared / name), str(timeout)] for name in own])

    @classmethod
    def of(cls, command: list[str]) -> Ranks:
        """Two processes of the same command."""
        ranks = cls.__new__(cls)
        ranks.processes = start([command, command])
        return ranks

    def wait_until_ready(self) -> None:
        until = time.monotonic() + SECONDS
        while not all((self.shared / f"ready{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until and all(p.poll() is None for p in self.processes)
            time.sleep(0.05)
        time.sleep(0.3)

    def send(self, rank: int, number: signal.Signals) -> None:
        self.wait_until_ready()
        self.processes[rank].send_signal(number)

    def ended(self, rank: int) -> tuple[int, str]:
        """The exit code and what was said."""
        _, said = self.processes[rank].communicate(timeout=SECONDS)
        return self.processes[rank].returncode, said

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGSTOP, 1),
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
    ],
)
def test_the_others_do_not_wait_for_a_stopped_or_killed_rank(
    tmp_path: Path, number: signal.Signals, victim: int
) -> None:
    ranks = Ranks("train", tmp_path)
    try:
        ranks.send(victim, number)
        code, said = ranks.ended(1 - victim)
    finally:
        ranks.end()
    assert code == 7, said
    assert f"rank {victim} on host {HOST}" in said
    assert f"rank {1 - victim} on" not in said
    log = (tmp_path / "logs" / f"rank-{1 - victim}.log").read_text()
    assert f"rank {victim} on host" in log or number == signal.SIGKILL


@pytest.mark.slow
def test_a_rank_that_lives_but_does_not_come_is_named_with_its_place(tmp_path: Path) -> None:
    ranks = Ranks("busy", tmp_path)
    try:
        code, said = ranks.ended(0)
        also, _ = ranks.ended(1)
    finally:
        ranks.end()
    assert (code, also) == (7, 7)
    assert f"waited too long for rank 1 on host {HOST}" in said and "cluster_worker.py" not in said


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("fail", 8, "a loss is not finite"),
        pytest.param("stop", 75, "SIGUSR1 came", marks=pytest.mark.slow),
    ],
)
def test_the_end_of_one_rank_is_the_end_of_all(
    tmp_path: Path, what: str, code: int, message: str
) -> None:
    ranks = Ranks(what, tmp_path, timeout=60)
    try:
        ended = [ranks.ended(rank) for rank in (0, 1)]
    finally:
        ranks.end()
    assert [found for found, _ in ended] == [code, code], ended
    assert f"rank 1 on host {HOST}" in ended[0][1] and message in ended[0][1]


def test_files_that_a_rank_does_not_see_are_named_with_rank_and_host(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(str(number))
    (tmp_path / "one" / "data0.jsonl").touch()
    ranks = Ranks("files", tmp_path, ("one", "two"), timeout=60)
    try:
        ended = [ranks.ended(rank) for rank in (0, 1)]
    finally:
        ranks.end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert ended[0][1] == ended[1][1], "all ranks raise the same"
    shared, read, compared = ended[0][1].split("---\n")[:3]
    who = f"rank 1 on host {HOST}: "
    assert shared.startswith(f"7 {who}the run directory is not shared: {tmp_path / 'two'} there")
    assert read.startswith(f"4 {who}") and str(tmp_path / "two" / "data1.jsonl") in read
    assert compared.startswith(f"7 {who}the data there is another than that of rank 0")


@pytest.mark.slow
def test_a_run_goes_on_after_a_rank_was_killed_with_the_same_heads(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    write_records(held_out, 1, "heldout", 4)
    options = ["--plugin", "qwen3", "--preset", "debug", "--device", "cpu", "--save-every", "1"]
    options += ["--task-samples", "64", "--max-steps", "12", "--global-batch", "4"]
    options += ["--eval-data", str(held_out), "--dist-timeout", "30", "--out"]
    heads = []
    for name in ("whole", "cut"):
        command = [sys.executable, "-m", "autodeco", "train", *options, str(tmp_path / name)]
        if name == "cut":
            killed = Ranks.of(command)
            while not list((tmp_path / name).glob("*/*/checkpoints/*-2-*")):
                assert all(p.poll() is None for p in killed.processes)
                time.sleep(0.02)
            killed.processes[1].kill()
            code, said = killed.ended(0)
            killed.end()
            assert code == 7 and f"rank 1 on host {HOST}" in said, said
        ranks = Ranks.of(command)
        ended = [ranks.ended(rank) for rank in (0, 1)]
        assert [code for code, _ in ended] == [0, 0], ended
        (last,) = (tmp_path / name).glob("*/*/checkpoints/*-12-*")
        heads.append(load_file(last / "model.safetensors"))
        rows = read_metrics(last.parents[1] / METRICS)
        assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 13))
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], rtol=0, atol=1e-6)


def test_processes_that_do_not_come_are_named(tmp_path: Path) -> None:
    ranks = Ranks("train", tmp_path, ("",), timeout=2)
    try:
        code, said = ranks.ended(0)
    finally:
        ranks.end()
    assert code == 7 and "the 2 processes did not meet in 2 s" in said and "127.0.0.1" in said


def test_a_rank_logs_lines_warnings_and_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda *_: None)  # what pytest has there
    with pytest.raises(DataError), rank_log(tmp_path, 3, "cuda:1") as log:
        log.info("train begins")
        logging.getLogger("some.library").warning("of a library\nin two lines")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of Python", stacklevel=1)
        raise DataError("no samples", where="file:3")
    lines = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert len(lines) == 5
    assert f"rank 3, host {HOST}, pid {os.getpid()}, device cuda:1" in lines[0]
    assert "train begins" in lines[1] and "of a library | in two lines" in lines[2]
    assert "UserWarning: of Python" in lines[3]
    assert "no samples" in lines[4] and "Traceback" in lines[4] and "in test_a_rank" in lines[4]
    with rank_log(tmp_path, 3, "cuda:1"):
        pass
    assert len((tmp_path / "logs" / "rank-3.log").read_text().splitlines()) == 7
