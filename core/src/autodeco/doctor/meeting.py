"""Ranks meet through torchrun's store, so that whoever fails or does not come has a name.

A collective that one rank never enters holds the others for minutes and then says nothing of who it
was. So results, failures and progress go through the store, and a thread of each rank watches it:
the first failure, or the end of the time, is reported by rank 0 and ends all ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autodeco.errors import AutodecoError, EnvironmentProblem, UsageError
from autodeco.processes import rank, world_size

_POLL = 0.2
_GRACE = 5.0
FAILED, TOLD = "failed", "told"
Infos = Sequence[Mapping[str, Any]]


class Meeting:
    """All ranks of one torchrun line.

    Args:
        timeout: Seconds until every rank must have come.

    Raises:
        UsageError: torchrun did not start this process.
        EnvironmentProblem: Nothing answers where the ranks are to meet.
    """

    def __init__(self, timeout: float) -> None:
        absent = [
            n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
        ]
        if absent:
            raise UsageError(
                f"--distributed is for processes that torchrun starts; {absent[0]} is not set",
                fix="torchrun --nproc-per-node N -m autodeco doctor --distributed --plugin FAMILY",
            )
        self.rank, self.world = rank(), world_size()
        self.host = socket.gethostname()
        self.timeout = timeout
        self.store = self.connect(serve=True)
        self.infos: Infos = ()
        self.leftovers: list[Path] = []
        self._steps = 0

    def connect(self, *, serve: bool = False) -> Any:
        """Returns a connection to the store; one that waits in it holds up no other."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address,
                port,
                self.world,
                is_master=serve and self.rank == 0 and not agent,
                timeout=timedelta(seconds=self.timeout),
                wait_for_workers=False,
            )
        except (dist.DistError, RuntimeError) as error:
            raise EnvironmentProblem(
                f"no store at {address}:{port} within {self.timeout:g} s: "
                f"{str(error).splitlines()[0]}",
                who=f"rank {self.rank} on {self.host}",
                where="MASTER_ADDR and MASTER_PORT, where rank 0 or torchrun's agent must listen",
                fix="see that rank 0 runs, and that this machine reaches it on that port",
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"autodeco-doctor/{attempt}"
        return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]

    def come(self, info: Mapping[str, Any]) -> None:
        """Waits for all ranks, and gives rank 0 what each of them says of itself.

        Raises:
            EnvironmentProblem: Some did not come; the message has their ranks and hosts.
        """
        mine = {"rank": self.rank, "host": self.host, **info}
        self.store.set(f"came/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            missing = self._wait_for("came", time.monotonic() + self.timeout)
            self.infos = [self._said(f"came/{r}") for r in range(self.world) if r not in missing]
            self.store.set("missing", json.dumps(missing))
        elif self.wait("missing", 2 * self.timeout + _GRACE):  # rank 0 may have come late
            missing = self._said("missing")
        else:
            missing = [0]
            self.infos = [self._said(f"came/{r}") for r in self._present("came")]
        if missing:
            self._somebody_is_missing(missing)

    def _somebody_is_missing(self, missing: list[int]) -> None:
        """The first of those that came says it; torchrun ends all as soon as one has gone."""
        present = self._present("came")
        if self.rank != present[0]:
            time.sleep(_GRACE)
            sys.exit(EnvironmentProblem.exit_code)
        time.sleep(1)  # the store may be in this process: the others hear of it before it goes
        came = ", ".join(f"{p} with ranks {r}" for p, r in self._by_host(present).items())
        raise EnvironmentProblem(
            f"{len(missing)} of {self.world} ranks did not come within {self.timeout:g} s: "
            + "; ".join(f"ranks {r} of {p}" for p, r in self._by_host(missing).items()),
            who=f"rank {self.rank} on {self.host}",
            where=f"came: {came}",
            fix="see whether the job's line runs there and what it printed, and whether that "
            "machine reaches MASTER_ADDR on MASTER_PORT; --timeout waits longer",
        )

    def _by_host(self, ranks: Sequence[int]) -> dict[str, str]:
        hosts = {int(info["rank"]): str(info["host"]) for info in self.infos}
        found: dict[str, list[int]] = {}
        for number in ranks:
            found.setdefault(guess_host(number, hosts), []).append(number)
        return {place: ranges(numbers) for place, numbers in found.items()}

    def _present(self, key: str) -> list[int]:
        return [r for r in range(self.world) if self.store.check([f"{key}/{r}"])]

    def _wait_for(self, key: str, end: float) -> list[int]:
        """Waits for a key of every rank; returns the ranks that have none."""
        while True:
            there = self._present(key)
            if len(there) == self.world or time.monotonic() > end:
                return [r for r in range(self.world) if r not in there]
            time.sleep(_POLL)

    def wait(self, key: str, seconds: float, store: Any = None) -> bool:
        """Returns whether the key appears in time."""
        end = time.monotonic() + seconds
        while not (store or self.store).check([key]):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL)
        return True

    def _said(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def step(self, name: str) -> None:
        """Says what this rank begins to do now."""
        self._steps += 1
        self.store.set(f"at/{self.rank}", json.dumps([self._steps, name]))

    def gather(self, name: str, value: Any) -> list[Any]:
        """Gives rank 0 a JSON value of every rank, in order; on the others an empty list."""
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        while self._wait_for(name, time.monotonic() + self.timeout):
            pass  # the watch ends this
        return [self._said(f"{name}/{r}") for r in range(self.world)]

    def share(self, name: str, value: Any = None) -> Any:
        """Gives every rank the JSON value of rank 0."""
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
        while not self.wait(name, self.timeout):
            pass
        return self._said(name)

    def place(self, number: int) -> str:
        """Returns a rank's name for messages; on rank 0."""
        return f"rank {number} on {self.infos[number]['host']}"


class Watch(threading.Thread):
    """Ends all ranks when one of them fails, or when the time is up.

    Args:
        meeting: Where the ranks met.
        limit: Seconds.
        tell: On rank 0: prints (check, what happened to whom, what to do or None).
    """

    def __init__(
        self, meeting: Meeting, limit: float, tell: Callable[[str, str, str | None], None]
    ) -> None:
        super().__init__(daemon=True)
        self.meeting, self.limit, self.tell = meeting, limit, tell
        self._store = meeting.connect()
        self._over = threading.Event()
        self._begin = time.monotonic()

    def fail(self, check: str, error: BaseException) -> None:
        """Reports that this rank failed; the process ends in here."""
        meeting = self.meeting
        said = {"rank": meeting.rank, "check": check, "what": f"{type(error).__name__}: {error}"}
        silent = self._silent() if _is_of_peers(error) else []
        if silent:
            also = f" (and ranks {ranges(silent[1:])})" if len(silent) > 1 else ""
            said |= {"rank": silent[0], "what": f"it has died, or its machine has gone{also}"}
        if isinstance(error, AutodecoError):
            said |= {"what": ", ".join(filter(None, (error.what, error.where))), "fix": error.fix}
        self._report(said)
        self.join(2 * _GRACE)  # it ends the process once rank 0 has told
        self._leave()

    def stop(self) -> None:
        """Ends the watch: all is well, or reported."""
        self._over.set()

    def run(self) -> None:
        """Looks into the store until the end."""
        while not self._over.wait(_POLL):
            try:
                self._look()
            except (dist.DistError, RuntimeError):
                # rank 0 has gone, and the store with it
                if not self._over.wait(1):
                    self._leave()

    def _look(self) -> None:
        spent = time.monotonic() - self._begin
        self._store.add(f"beat/{self.meeting.rank}", 1)
        if self._store.check([FAILED]):
            said = json.loads(self._store.get(FAILED))
            if self.meeting.rank == 0:
                who = self.meeting.place(said["rank"])
                self.tell(said["check"], f"{who}: {said['what']}", said.get("fix"))
                self._store.set(TOLD, "")
                time.sleep(1)  # the others hear of it while there is a store
            else:
                self.meeting.wait(TOLD, _GRACE, self._store)
            self._leave()
        elif spent > self.limit and self.meeting.rank == 0:
            self._report(self._slowest())
        elif spent > self.limit + 2 * _GRACE:
            print(f"rank {self.meeting.rank}: rank 0 is silent", file=sys.stderr)
            self._leave()

    def _silent(self) -> list[int]:
        """Returns the ranks that give no sign of life: in a collective, others get the error."""

        def beats() -> list[int]:
            return [self._store.add(f"beat/{r}", 0) for r in range(self.meeting.world)]

        before = beats()
        time.sleep(_GRACE / 2)
        return [r for r, (a, b) in enumerate(zip(before, beats(), strict=True)) if a == b]

    def _report(self, said: Mapping[str, Any]) -> None:
        self._store.compare_set(FAILED, "", json.dumps(said))  # the first failure is the cause

    def _slowest(self) -> dict[str, Any]:
        """The rank that has come least far, with how far the others are."""
        at = [(0, "beginning")] * self.meeting.world
        for number in range(self.meeting.world):
            if self._store.check([f"at/{number}"]):
                at[number] = tuple(json.loads(self._store.get(f"at/{number}")))
        least = min(at)[0]
        slow = [number for number, (step, _) in enumerate(at) if step == least]
        what = at[slow[0]][1]
        others = f" (and ranks {ranges(slow[1:])})" if len(slow) > 1 else ""
        said = f"still at '{what}' after {self.limit:g} s{others}"
        return {"rank": slow[0], "check": what.split(":")[0], "what": said}

    def _leave(self) -> None:
        for path in self.meeting.leftovers:
            shutil.rmtree(path, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EnvironmentProblem.exit_code)  # the main thread may wait for a rank for ever


def _is_of_peers(error: BaseException) -> bool:
    """Whether a collective may have failed here because of another rank."""
    signs = ("gloo", "nccl", "closed by peer", "reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def ranges(numbers: Sequence[int]) -> str:
    """Writes sorted numbers shortly: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def guess_host(number: int, hosts: Mapping[int, str]) -> str:
    """Names the machine of a rank: one that said so, a neighbour's, Slurm's, or its number.

    Args:
        number: The rank.
        hosts: Rank -> host, of those that came.
    """
    if number in hosts:
        return hosts[number]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not local:
        return "an unknown host"
    machine = number // local
    near = [host for other, host in sorted(hosts.items()) if other // local == machine]
    if near:
        return near[0]
    names = slurm_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
    known = f" ({names[machine]})" if machine < len(names) else ""
    return f"machine {machine}{known}, from which none came"


def slurm_hosts(text: str) -> list[str]:
    """Expands Slurm's list of nodes: ``node[01-03,7],login``."""
    found = []
    for stem, inner in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?", text):
        for part in inner.split(",") if inner else [""]:
            first, _, last = part.partition("-")
            if not first:
                found.append(stem)
                continue
            numbers = range(int(first), int(last or first) + 1)
            found += [f"{stem}{number:0{len(first)}d}" for number in numbers]
    return found
