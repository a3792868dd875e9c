"""Every file operation of a run, interrupted: killed there, or refused by a full disk.

The operations below the run directory are counted in a clean run; then they are broken one by one,
each in a process of its own, and the job is run again without faults. A process is killed *before*
an operation (of a write: when half of it is on the disk) and *after* one; in the same two places
the system reports ENOSPC, as a full disk does.

A run of three checkpoints has about 300 operations. Covered are all that differ in function, place
in the code (three lines deep) or kind of file, each at its first and, for "before", also at its
last occurrence. "After" a plain operation the disk is as it is before the next one, so "after" a
kill covers only those after which a buffer or a name may be lost; ENOSPC "after" covers those that
report errors late.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from crash_tools import KILLED, Server, finished, outcome

from autodeco import stories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

AFTER = {
    "kill": {"open", "write", "save_file", "replace", "rename", "link"},
    "full": {"write", "flush", "fsync", "replace", "rename"},
}
# These may fail without harm: what is not removed is removed later, what is not linked is copied.
TOLERATED = {"unlink", "rmdir", "link"}
ENVIRONMENT_PROBLEM = 7


class Crash:
    """Two servers, so that two processors work, and the job."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.evaluation = root / "held_out.jsonl"
        stories.write_records(self.evaluation, 5, "heldout", 4)
        self.servers: SimpleQueue[Server] = SimpleQueue()
        self.all = [Server(root) for _ in range(2)]
        for server in self.all:
            self.servers.put(server)

    def options(self, place: Path, **more: Any) -> dict[str, Any]:
        return {
            "out": place / "out",
            "eval_data": self.evaluation,
            "task_samples": 8,
            "global_batch": 4,
            "max_steps": 2,
            "save_every": 1,
            "eval_every": 2,
            "keep": 1,
            "evaluate_problems": 1,
            "max_new_tokens": 2,
            **more,
        }

    def run(self, options: dict[str, Any], **request: Any) -> dict[str, Any]:
        server = self.servers.get()
        try:
            return server.run(options, **request)
        finally:
            self.servers.put(server)


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crash]:
    made = Crash(tmp_path_factory.mktemp("faults"))
    yield made
    for server in made.all:
        server.close()


def chosen(points: Sequence[Sequence[str]], mode: str, when: str) -> list[int]:
    """The first and the last of each kind, by number."""
    first: dict[tuple[str, ...], int] = {}
    last: dict[tuple[str, ...], int] = {}
    for number, point in enumerate(points):
        if when == "after" and point[0] not in AFTER[mode]:
            continue
        first.setdefault(tuple(point), number)
        last[tuple(point)] = number
    return sorted({*first.values(), *(last.values() if when == "before" else ())})


def check_error(answer: dict[str, Any], place: Path) -> None:
    """A full disk is an error that says where and what to do, or one of those without harm."""
    if answer["code"] == 0:
        harmless = answer["point"][0] in TOLERATED or "logs/rank-" in " ".join(answer["point"])
        assert harmless, f"swallowed: {answer['point']}"
        return
    assert answer["code"] == ENVIRONMENT_PROBLEM and not answer.get("raw"), answer["error"]
    message = answer["error"]
    assert "No space left" in message and "free some space" in message, message
    assert f"where: {place}/out/" in message or f"where: {place}/out\n" in message, message
    if answer["point"][0] in ("write", "flush", "open", "fsync", "sendfile", "save_file"):
        assert not list(place.rglob("*.partial")), "not cleaned up"


def attempt(crash: Crash, place: Path, index: int, mode: str, when: str) -> dict[str, Any]:
    """Breaks operation `index`, runs again, and returns what came out."""
    options = crash.options(place)
    fault = {"index": index, "mode": mode, "when": when}
    answer = crash.run(options, fault=fault)
    if mode == "kill":
        assert answer["code"] == KILLED, answer
    else:
        check_error(answer, place)
    if not finished(place / "out"):
        again = crash.run(options)
        assert again["code"] == 0, again.get("error")
    elif mode == "full" and answer["point"][0] in ("unlink", "rmdir"):
        remove_leftovers(place)
    result = outcome(place / "out")
    shutil.rmtree(place)
    return result


def remove_leftovers(place: Path) -> None:
    """What could not be deleted has lost its name; no later start of a finished run removes it."""
    for path in place.glob("out/*/*/checkpoints/.*.old.partial"):
        shutil.rmtree(path)
    for pattern in (".autodeco-link.*.partial", ".merged.lock"):
        for path in place.glob(f"out/*/*/{pattern}"):
            path.unlink()


def collect(crash: Crash, tasks: Sequence[Any], one: Any) -> None:
    """Runs all, two at a time; fails with every failure, not only the first."""

    def guarded(task: Any) -> str | None:
        try:
            one(task)
        except AssertionError as error:
            return f"{task}: {error}"
        return None

    with ThreadPoolExecutor(len(crash.all)) as pool:
        failures = [text for text in pool.map(guarded, tasks) if text]
    assert not failures, f"{len(failures)} of {len(tasks)}:\n" + "\n".join(failures)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_run_survives_a_fault_at_every_file_operation(crash: Crash, mode: str, when: str) -> None:
    clean = crash.root / f"clean-{mode}-{when}"
    counted = crash.run(crash.options(clean), fault=None, trace=True)
    assert counted["code"] == 0, counted.get("error")
    expected, points = outcome(clean / "out"), counted["points"]
    functions = {point[0] for point in points}
    assert functions >= {"open", "write", "flush", "fsync", "replace", "rename", "mkdir", "link"}
    assert functions >= {"unlink", "sendfile", "save_file"} and len(points) > 250

    def one(index: int) -> None:
        got = attempt(crash, crash.root / f"{mode}-{when}-{index}", index, mode, when)
        for part, value in expected.items():
            assert got[part] == value, f"{points[index]}: other {part}"

    collect(crash, chosen(points, mode, when), one)


@pytest.mark.parametrize("mode", ["kill", "full"])
def test_export_and_merge_of_a_trained_run_survive_faults_and_spare_the_base(
    crash: Crash, mode: str
) -> None:
    """The stages alone, done again over older results; the base lies elsewhere."""
    trained = crash.root / f"trained-{mode}"
    done = crash.run(crash.options(trained))
    assert done["code"] == 0, done.get("error")
    (run,) = (trained / "out").glob("*/*")
    base, data = crash.root / f"base-{mode}", crash.root / f"train-{mode}.jsonl"
    shutil.copytree(run / "model", base)
    shutil.copy(run / "data" / "train.jsonl", data)
    own = {"model": base, "data": data, "merge": "autodeco"}
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in base.iterdir()}

    seed = crash.root / f"seed-{mode}"
    stages = ["import", "build", "attach", "train", "export", "merge"]
    done = crash.run(crash.options(seed, **own), stages=stages)
    assert done["code"] == 0, done.get("error")

    def result(place: Path) -> dict[str, Any]:
        return {k: v for k, v in outcome(place / "out").items() if k != "top"}

    expected = result(seed)
    copy = shutil.copytree(seed, crash.root / f"copy-{mode}")
    counted = crash.run(
        crash.options(copy, **own), stages=["export", "merge"], fault=None, trace=True
    )
    assert counted["code"] == 0 and result(copy) == expected
    points = counted["points"]

    def one(index: int) -> None:
        place = shutil.copytree(seed, crash.root / f"again-{mode}-{index}")
        fault = {"index": index, "mode": mode, "when": "before"}
        options = crash.options(place, **own)
        answer = crash.run(options, stages=["export", "merge"], fault=fault)
        if mode == "kill":
            assert answer["code"] == KILLED, answer
        else:
            check_error(answer, place)
        again = crash.run(options, stages=["export", "merge"])
        assert again["code"] == 0, again.get("error")
        assert result(place) == expected, points[index]
        shutil.rmtree(place)

    collect(crash, chosen(points, mode, "before"), one)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in base.iterdir()}
    assert after == before, json.dumps(sorted(after))
