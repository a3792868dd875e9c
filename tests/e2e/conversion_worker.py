"""Breaks a conversion at each of its file operations, in forked processes, and runs it again.

A program, so that it has one thread when it forks: ``conversion_worker.py WHAT SOURCE ROOT``.
Prints JSON: how many operations there are, how many were broken, and what went wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from crash_tools import KILLED, Faults
from rich.console import Console

AFTER = {"open", "write", "pwrite", "fsync", "replace", "rename"}
ENVIRONMENT_PROBLEM = 7


def cast(source: Path, output: Path) -> None:
    from autodeco.convert.casting import cast_checkpoint

    cast_checkpoint(source, output, workers=1, console=Console(quiet=True))


def convert(source: Path, output: Path) -> None:
    from autodeco.convert import workers
    from autodeco.convert.source import open_source
    from autodeco.engines.megatron import importing
    from autodeco.job import Job
    from autodeco.registry import Registry

    workers.default_workers.__code__ = (lambda: 1).__code__
    found = Registry().resolve(None, source, None)
    weights = open_source(found.family, Job(model=source, preset=found.preset.name))
    architecture = found.family.architecture(found.preset.architecture)
    importing.import_checkpoint(
        weights, architecture, output, part_bytes=1_200_000, console=Console(quiet=True)
    )


def load(what: str) -> None:
    """Imports what a conversion needs, once for all forked processes."""
    import autodeco.convert.casting

    if what == "import":
        import autodeco.engines.megatron.importing
        import autodeco.registry

        autodeco.registry.Registry().rows()


def forked(act: Callable[[], Any], report: Path) -> int:
    """Runs something in a process of its own; returns its exit code."""
    from autodeco.errors import AutodecoError

    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code, write = 1, Path.write_text
        try:
            sink = os.open(os.devnull, os.O_RDWR)
            os.dup2(sink, 2)
            try:
                code, text = 0, json.dumps(act())
            except AutodecoError as error:
                code, text = error.exit_code, str(error)
            except BaseException:
                code, text = 1, traceback.format_exc()
            write(report, text)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory -> the hash of its content; without clocks in pickles."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {str(p.relative_to(directory)): _hash(p) for p in files}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def broken(act: Callable[[], Any], root: Path, index: int | None, mode: str, when: str) -> Any:
    faults = Faults(root, index, mode, when)
    faults.install()
    act()
    return faults.points


def main(what: str, source: Path, root: Path) -> dict[str, Any]:
    conversion = {"cast": cast, "import": convert}[what]
    torch.set_num_threads(1)
    load(what)
    report, clean = root / "report.json", root / "clean"
    before = tree(source)

    def run(place: Path, *fault: Any) -> int:
        def act() -> Any:
            return conversion(source, place / "out")

        return forked((lambda: broken(act, place, *fault)) if fault else act, report)

    clean.mkdir()
    assert run(clean, None, "kill", "before") == 0, report.read_text()
    points, expected = json.loads(report.read_text()), tree(clean)
    problems, count = [], 0
    for mode, when in (
        ("kill", "before"),
        ("kill", "after"),
        ("full", "before"),
        ("full", "after"),
    ):
        seen: set[tuple[str, ...]] = set()
        for index, point in enumerate(points):
            if tuple(point) in seen or (when == "after" and point[0] not in AFTER):
                continue
            seen.add(tuple(point))
            count += 1
            place = root / f"{mode}-{when}-{index}"
            place.mkdir()
            code = run(place, index, mode, when)
            if mode == "kill" and code != KILLED:
                problems.append(f"{index} {point}: not killed, {code}")
            if mode == "full" and code not in (0, ENVIRONMENT_PROBLEM):
                problems.append(f"{index} {point}: {code} {report.read_text()}")
            harmless = point[0] in ("unlink", "rmdir") or point[-1].startswith("..out.")
            if mode == "full" and code == 0 and not harmless:  # what is left is removed later
                problems.append(f"{index} {point}: a full disk was swallowed")
            if (place / "out").exists() and code and tree(place / "out") != tree(clean / "out"):
                problems.append(f"{index} {point}: it looks complete and is not")
            if run(place) != 0:
                problems.append(f"{index} {point} {mode} {when}: again: {report.read_text()}")
            elif tree(place) != expected:
                odd = set(tree(place).items()) ^ set(expected.items())
                problems.append(f"{index} {point} {mode} {when}: other files: {sorted(odd)[:3]}")
            shutil.rmtree(place)
    if tree(source) != before:
        problems.append("the source has changed")
    return {"points": len(points), "broken": count, "problems": problems}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
