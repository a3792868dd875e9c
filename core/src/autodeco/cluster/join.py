"""How the processes of a run meet, agree on what they read and where they write, and end."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from autodeco.cluster.heartbeat import GO_ON, Heartbeat, Verdict
from autodeco.cluster.log import in_one_line
from autodeco.errors import AutodecoError, EnvironmentProblem, StoppedEarly
from autodeco.files import PARTIAL_SUFFIX, atomic_write_text
from autodeco.job import Job
from autodeco.processes import rank, world_size
from autodeco.stopping import signals_ignored

_Value = TypeVar("_Value")
_SHARED_SECONDS = 30.0  # what a network filesystem may take to show a new file
_MARGIN = 30.0  # seconds by which the signs of life are to be faster than the collectives


@dataclass(frozen=True)
class Cluster:
    """The processes of a run; one process alone is a cluster too.

    Attributes:
        rank: This process's.
        hosts: The host of each rank.
        heartbeat: The signs of life, None for one process.
    """

    rank: int
    hosts: tuple[str, ...]
    heartbeat: Heartbeat | None = None

    def names(self, ranks: Iterable[int]) -> str:
        """Returns how ranks are named to people: by host."""
        by_host: dict[str, list[int]] = defaultdict(list)
        for number in ranks:
            by_host[self.hosts[number]].append(number)
        return "; ".join(
            f"rank{'s' if len(those) > 1 else ''} {', '.join(map(str, those))} on host {host}"
            for host, those in by_host.items()
        )

    def together(self, work: Callable[[], _Value]) -> _Value:
        """Does something on every rank; where one fails, all do, with its error.

        Raises:
            AutodecoError: That of the first rank that failed; it names all that did.
        """
        mine: AutodecoError | None = None
        result: Any = None
        try:
            result = work()
        except AutodecoError as error:
            mine = error
        errors: list[AutodecoError | None] = self._gathered(mine)
        failed = [number for number, error in enumerate(errors) if error is not None]
        if failed:
            first = errors[failed[0]]
            assert first is not None
            if len(self.hosts) > 1:
                first.who = self.names(failed) + (f": {first.who}" if first.who else "")
            first.agreed = True
            raise first
        value: _Value = result
        return value

    def from_first(self, value: _Value) -> _Value:
        """Returns rank 0's value on every rank."""
        first: _Value = self._gathered(value)[0]
        return first

    def same_inputs(self, digests: Mapping[str, str]) -> None:
        """Checks that all ranks read the same.

        Raises:
            EnvironmentProblem: A rank reads other content than rank 0; it names rank and host.
        """
        everyone = self._gathered(dict(digests))
        for name, digest in everyone[0].items():
            others = [n for n, theirs in enumerate(everyone) if theirs.get(name) != digest]
            if others:
                raise _agreed(
                    f"the {name.replace('_', '-')} there is another than that of rank 0",
                    who=self.names(others),
                    where=f"--{name.replace('_', '-')}",
                    fix="give all machines the same, on a shared filesystem or as equal copies",
                )

    def same_layout(self, layout: str | None) -> None:
        """Checks that all ranks came to the same layout.

        Raises:
            EnvironmentProblem: A rank came to another than rank 0; it names rank and host.
        """
        everyone = self._gathered(layout)
        others = [number for number, theirs in enumerate(everyone) if theirs != everyone[0]]
        if others:
            raise _agreed(
                f"the layout that fits there is {everyone[others[0]]}, that of rank 0 is "
                f"{everyone[0]}: the processes have unequal memory",
                who=self.names(others),
                where="--layout",
                fix="give --layout; autodeco plan shows those that fit",
            )

    def require_shared(self, directory: Path, seconds: float = _SHARED_SECONDS) -> None:
        """Checks that every rank sees what rank 0 writes.

        Args:
            directory: The run directory.
            seconds: What a filesystem may take.

        Raises:
            EnvironmentProblem: A rank does not; it names rank, host and path.
        """
        if len(self.hosts) == 1:
            return
        # rank 0 may see another directory of that name: the name of the token is not enough
        token = self.from_first(uuid.uuid4().hex)
        path = directory / f".shared-{token}{PARTIAL_SUFFIX}"
        if self.rank == 0:
            atomic_write_text(path, token)
        self._gathered(None)
        sees = self.rank == 0 or _appears(path, token, seconds)
        everyone = self._gathered((sees, str(directory.absolute())))
        if self.rank == 0:
            with suppress(OSError):
                path.unlink()
        blind = [number for number, (seen, _) in enumerate(everyone) if not seen]
        if blind:
            raise _agreed(
                f"the run directory is not shared: {everyone[blind[0]][1]} there does not have "
                f"what rank 0 on host {self.hosts[0]} writes to {everyone[0][1]}",
                who=self.names(blind),
                where=everyone[0][1],
                fix="give --out a directory that all machines share; rank 0 writes the run there "
                "and every rank its log; model and data must be readable on all machines",
            )

    def _gathered(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, on every rank."""
        if len(self.hosts) == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * len(self.hosts)
        dist.all_gather_object(values, value)
        return values


def _agreed(what: str, **more: str) -> EnvironmentProblem:
    problem = EnvironmentProblem(what, **more)
    problem.agreed = True
    return problem


def _appears(path: Path, content: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            list(path.parent.iterdir())  # makes a network filesystem look again
            if path.read_text() == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


@contextmanager
def joined(job: Job) -> Iterator[Cluster]:
    """Joins the other processes that were started; one alone joins nobody.

    Within, an error of one rank ends all, and every error names its rank and host.

    Raises:
        EnvironmentProblem: Not all processes came, or a rank died or hung.
    """
    if world_size() == 1:
        yield Cluster(0, (socket.gethostname(),))
        return
    cluster = _join(job)
    heartbeat = cluster.heartbeat
    assert heartbeat is not None
    try:
        yield cluster
    except BaseException as error:
        if getattr(error, "agreed", False):
            heartbeat.finish()
            raise
        lost = next((e for e in (error, error.__context__) if _is_of_peers(e)), None)
        if lost is not None:
            with signals_ignored():  # torchrun sends SIGTERM as soon as one of its processes died
                verdict = heartbeat.blame(lost)
            raise _as_error(verdict) from error
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        heartbeat.post(code, in_one_line(error))
        if isinstance(error, AutodecoError):
            here = heartbeat.name(cluster.rank)
            error.who = f"{here}: {error.who}" if error.who else here
        raise
    else:
        heartbeat.finish()
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _as_error(verdict: Verdict) -> BaseException:
    """The error that this rank ends with because of another one: of the same kind."""
    if verdict.code == StoppedEarly.exit_code:
        return StoppedEarly(verdict.text)
    if verdict.code == 130:
        return KeyboardInterrupt(verdict.text)
    kinds = {kind.exit_code: kind for kind in AutodecoError.__subclasses__()}
    return kinds.get(verdict.code, EnvironmentProblem)(verdict.text, fix=GO_ON)


def _is_of_peers(error: BaseException | None) -> bool:
    """Whether a collective failed here because of another rank."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset")
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in signs)


def _join(job: Job) -> Cluster:
    import torch.distributed as dist

    from autodeco.engines.select import choose_device

    device = choose_device(job.device)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    patience = timedelta(seconds=job.dist_timeout)
    mine, world, began = rank(), world_size(), time.monotonic()
    try:
        meeting = dist.rendezvous("env://", mine, world, timeout=patience)  # type: ignore[attr-defined]
        store = next(meeting)[0]
    except (RuntimeError, ValueError) as error:
        raise _nobody_came(in_one_line(error), job) from error
    store.set_timeout(patience)
    # A store of their own for the signs of life: one operation at a time goes through each.
    ours: Any = dist.PrefixStore("autodeco", store)  # type: ignore[attr-defined]
    ours = ours.clone()
    left = max(1.0, job.dist_timeout - (time.monotonic() - began))
    hosts = _hosts(ours, mine, world, left, job)
    heartbeat = Heartbeat(ours, mine, hosts, job.dist_timeout)
    heartbeat.start()
    longer = timedelta(seconds=job.dist_timeout + _MARGIN)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=mine, world_size=world, timeout=longer)
    return Cluster(mine, hosts, heartbeat)


def _hosts(store: Any, mine: int, world: int, seconds: float, job: Job) -> tuple[str, ...]:
    """Every rank says where it is; who does not come is named."""
    store.set(f"host/{mine}", json.dumps([socket.gethostname(), os.getpid()]))
    keys = [f"host/{number}" for number in range(world)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        missing = [n for n, key in enumerate(keys) if not store.check([key])]
        raise _nobody_came("missing: rank " + ", ".join(map(str, missing)), job) from error
    return tuple(str(json.loads(store.get(key))[0]) for key in keys)


def _nobody_came(what: str, job: Job) -> EnvironmentProblem:
    address = ":".join(os.environ.get(n, "?") for n in ("MASTER_ADDR", "MASTER_PORT"))
    return EnvironmentProblem(
        f"the {world_size()} processes did not meet in {job.dist_timeout:g} s: {what}",
        who=f"rank {rank()} on host {socket.gethostname()}",
        where=f"MASTER_ADDR:MASTER_PORT {address}",
        fix="start as many processes as there are ranks, all with the same address and port, which "
        "every machine must reach; a slow start needs a longer --dist-timeout",
    )
