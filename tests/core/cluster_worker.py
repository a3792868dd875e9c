"""One rank of a tiny cluster, run as a program by test_cluster.py.

Arguments: what it does, a directory for all ranks, one for this rank, and dist_timeout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from autodeco.cluster import join
from autodeco.cluster.join import Cluster, joined
from autodeco.cluster.log import rank_log
from autodeco.errors import AutodecoError, NumericsError, StoppedEarly
from autodeco.job import Job
from autodeco.training.data import file_digest


def step() -> None:
    dist.all_reduce(torch.ones(1))


def tried(check: Callable[[], object]) -> None:
    try:
        check()
    except AutodecoError as error:
        assert error.agreed
        print(f"{error.exit_code} {error}\n---", file=sys.stderr)


def work(what: str, cluster: Cluster, shared: Path, own: Path) -> None:
    (shared / f"ready{cluster.rank}").touch()
    if what == "files":
        tried(lambda: cluster.require_shared(own, seconds=1))
        tried(lambda: cluster.together(lambda: file_digest(own / f"data{cluster.rank}.jsonl")))
        tried(lambda: cluster.same_inputs({"data": file_digest(own / "data.jsonl")}))
        return
    if what == "fail" and cluster.rank == 1:
        raise NumericsError("a loss is not finite", where="step 3")
    elif what == "stop" and cluster.rank == 1:
        raise StoppedEarly("SIGUSR1 came")
    elif what == "busy" and cluster.rank == 1:
        time.sleep(600)
    while True:
        step()
        time.sleep(0.05)


def main(what: str, shared: Path, own: Path, timeout: float) -> None:
    join._MARGIN = 1.0  # gloo gives up soon after the signs of life do
    job = Job(device="cpu", dist_timeout=timeout)
    try:
        with joined(job) as cluster, rank_log(shared, cluster.rank, "cpu"):
            work(what, cluster, shared, own)
    except (AutodecoError, StoppedEarly) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
