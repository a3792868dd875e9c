"""Feeds spoiled files to everything in autodeco that reads a user's file, and reports what breaks.

    tools/fuzz.py --seconds 60 --seed 1                 # all targets, a minute each
    tools/fuzz.py --seconds 600 --seed 2 header index   # these
    tools/fuzz.py --list

A reader may refuse a file with an error of autodeco's own, or read it. Any other exception, a read
that takes too long or too much memory, and a file that the safetensors library understands
otherwise are findings: each is printed once, with the directory that reproduces it.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutations import mutation_of  # type: ignore[import-not-found]
from fuzz_targets import Target, targets  # type: ignore[import-not-found]

from autodeco.errors import AutodecoError

LONGEST = 20.0  # seconds that a read of these small files may take
MEMORY = 4 << 30  # bytes above what the process has when it begins


class TooLong(BaseException):
    """A read that does not end."""


@dataclass
class Report:
    """What came of one target.

    Attributes:
        read: Files that were read.
        refused: Files that were refused.
        findings: Key -> text and reproducer.
    """

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)


def spoiled(target: Target, seed_directory: Path, rng: random.Random) -> tuple[str, bytes]:
    """Returns a file of the target and its spoiled content."""
    name = rng.choice(target.files)
    data = (seed_directory / name).read_bytes()
    return name, mutation_of(name)(data, rng)


def attempt(target: Target, directory: Path) -> AutodecoError | None:
    """Reads a directory; returns the refusal, if there is one; all else is a finding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(directory)
        except AutodecoError as error:
            str(error)
            return error
    return None


def fuzz(target: Target, seconds: float, seed: int, out: Path) -> Report:
    """Spoils and reads until the time is over.

    Args:
        target: What reads.
        seconds: How long.
        seed: Of the mutations.
        out: Reproducers go there.
    """
    report = Report()
    rng = random.Random(f"{seed} {target.name}")
    with tempfile.TemporaryDirectory(prefix="autodeco-fuzz-") as place:
        good, work = Path(place) / "good", Path(place) / "work" / "given"
        good.mkdir()
        target.make(good)
        shutil.copytree(good, work)
        refusal = attempt(target, work)
        if refusal is not None:
            raise SystemExit(f"{target.name}: the unspoiled files are refused: {refusal}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name, content = spoiled(target, good, rng)
            shutil.rmtree(work)
            shutil.copytree(good, work)
            (work / name).write_bytes(content)
            error = _guarded(target, work)
            if error is None or isinstance(error, AutodecoError):
                report.read += error is None
                report.refused[type(error).__name__] += error is not None
                continue
            key = _key(error)
            if key not in report.findings:
                kept = out / f"{target.name}-{len(report.findings) + 1}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(work, kept)
                text = "".join(traceback.format_exception(error)[-6:])
                report.findings[key] = f"{kept} ({name})\n{text}"
                print(f"FINDING {target.name}: {key}\n{report.findings[key]}", flush=True)
    return report


def _guarded(target: Target, work: Path) -> BaseException | None:
    def stop(*_: Any) -> None:
        raise TooLong(f"longer than {LONGEST:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        return attempt(target, work)
    except (Exception, TooLong) as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _key(error: BaseException) -> str:
    """What tells two findings apart: the exception and the innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/autodeco/" in f.filename or "autodeco_plugin" in f.filename]
    where = ours[-1] if ours else frames[-1]
    return f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"


def _limit_memory() -> None:
    """A read that wants gigabytes for a small file gets a MemoryError."""
    status = Path("/proc/self/statm")
    if status.exists():
        held = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    """Runs the targets; returns the number of findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="for reproducers; default: a temporary directory")
    parser.add_argument("--list", action="store_true", help="print the targets")
    given = parser.parse_args()
    known = {target.name: target for target in targets()}
    if given.list:
        print("\n".join(known))
        return 0
    if unknown := set(given.targets) - set(known):
        parser.error(f"no targets: {', '.join(sorted(unknown))}")
    out = given.out or Path(tempfile.mkdtemp(prefix="autodeco-findings-"))
    out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _limit_memory()
    count = 0
    for name in given.targets or known:
        report = fuzz(known[name], given.seconds, given.seed, out)
        count += len(report.findings)
        refused = sum(report.refused.values())
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(report.refused.items()) if n)
        print(
            f"{name}: {report.read + refused} files, {report.read} read, {refused} refused"
            + (f" ({kinds})" if kinds else "")
            + f", {len(report.findings)} findings",
            flush=True,
        )
    return min(count, 100)


if __name__ == "__main__":
    sys.exit(main())
