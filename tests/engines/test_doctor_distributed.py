"""`autodeco doctor --distributed` on processes that agree, and on ranks made ill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

WORKER = Path(__file__).with_name("doctor_worker.py")
COMMAND = ("doctor", "--distributed", "--plugin", "qwen3", "--device", "cpu", "--json")
CHECKS = {"rendezvous", "devices", "versions", "process group", "all-reduce", "debug model"}
SECONDS = 120


def environment(**more: str) -> dict[str, str]:
    # gloo shall not look up the machine's name, which need not resolve
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


@pytest.mark.parametrize(("layout", "preset"), [("tp=2", "debug"), ("pp=2", "debug-moe")])
def test_under_torchrun(layout: str, preset: str, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    done = subprocess.run(
        [*launcher, "2", "-m", "autodeco", *COMMAND, "--layout", layout, "--out", "a/runs"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)  # one document, of rank 0
    rows = {row["name"]: row for row in told["rows"]}
    assert told["ok"] and set(rows) >= CHECKS, rows
    assert f"qwen3 {preset}, megatron engine at {layout}" in rows["debug model"]["found"]
    assert "GB/s" in rows["all-reduce"]["found"] and "point to point, 16 MiB" in rows
    assert "ranks 0-1" in rows["rendezvous"]["found"]
    assert list(tmp_path.iterdir()) == [], "nothing is left where runs will be"


def launch(folder: Path, kind: str, *options: str, world: int = 2, ranks: int = 2) -> list[Any]:
    """Starts ranks without torchrun, which would end one as soon as another has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, *COMMAND, "--out", "runs", *options],
            cwd=folder,
            env=environment(RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", **places),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=SECONDS) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def problems(results: list[Any], last: int = 7) -> dict[str, Any]:
    """The rows of rank 0 that are problems; all ranks must have ended with 7, the others silent."""
    assert [code for code, _, _ in results] == [7] * (len(results) - 1) + [last], results
    assert [out for _, out, _ in results[1:]] == [""] * (len(results) - 1)
    told = json.loads(results[0][1])
    assert not told["ok"]
    return {row["name"]: row for row in told["rows"] if row["state"] == "problem"}


def test_other_numbers_versions_and_directories_are_named_by_rank_and_host(tmp_path: Path) -> None:
    found = problems(launch(tmp_path, "differs", "--layout", "tp=2"))
    assert set(found) == {"versions", "shared run directory", "debug model"}
    assert "9.9 on ill-host (ranks 1)" in found["versions"]["found"]
    assert "rank 1 on ill-host" in found["shared run directory"]["found"]
    assert "rank 0" not in found["shared run directory"]["found"]
    lines = found["debug model"]["found"].splitlines()
    assert lines[1:] == ["rank 1 on ill-host: 2.5e-01"], "rank 0 computes well"


def test_a_rank_that_fails_ends_all_and_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    (row,) = problems(launch(tmp_path, "raises")).values()
    assert row["name"] == "all-reduce"
    assert "rank 1 on ill-host: RuntimeError: the card has fallen off the bus" in row["found"]
    assert time.monotonic() - began < 60, "nobody waits for the collective's timeout"


def test_a_rank_that_dies_is_named_and_not_who_waited_for_it(tmp_path: Path) -> None:
    (row,) = problems(launch(tmp_path, "dies"), last=-signal.SIGKILL).values()
    assert "rank 1 on ill-host: it has died" in row["found"]


def test_a_rank_that_hangs_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    (row,) = problems(launch(tmp_path, "hangs", "--limit", "4")).values()
    assert row["name"] in ("all-reduce", "point to point")
    assert "still at 'all-reduce' after 4 s" in row["found"]


def test_ranks_that_do_not_come_are_named_with_their_hosts(tmp_path: Path) -> None:
    first, second = launch(tmp_path, "well", "--timeout", "4", world=6, ranks=2)
    assert first[:2] == second[:2] == (7, "")
    assert "4 of 6 ranks did not come within 4 s: ranks 2-3 of machine 1" in first[2]
    assert f"{socket.gethostname()} with ranks 0, ill-host with ranks 1" in first[2]
    assert "did not come" not in second[2], "one of them says it"


def test_an_impossible_layout_is_refused_before_anyone_meets(tmp_path: Path) -> None:
    ((code, _, err),) = launch(tmp_path, "well", "--layout", "pp=3", ranks=1)
    assert code == 2 and "pp 3 x cp 1 = 3 does not divide 2 processes" in err
