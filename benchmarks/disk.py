"""What the benchmarks of conversions share: cold caches, copies to compare with, peak memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Measured:
    """A child process: its seconds, and the most memory that it held, in bytes."""

    seconds: float
    peak: int
    peak_anonymous: int


def drop_caches() -> bool:
    """Writes back and empties the page cache; returns whether we may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def files_size(directory: Path) -> int:
    """Returns the bytes of the files in a directory tree."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def sync_files(directory: Path) -> None:
    """Flushes every file below a directory to the disk."""
    for path in directory.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy_seconds(source: Path, target: Path) -> float:
    """Copies a directory with ``cp --reflink=never`` and flushes it to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    drop_caches()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    sync_files(target)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def run_child(command: Sequence[str], clear: Callable[[], object]) -> Measured:
    """Runs a command with cold caches, after `clear`, and watches its memory.

    Raises:
        SystemExit: It failed.
    """
    clear()
    drop_caches()
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    anonymous = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, anonymous), daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)} failed: {os.waitstatus_to_exitcode(status)}")
    watcher.join()
    return Measured(seconds, usage.ru_maxrss * 1024, anonymous[0])


def _watch(pid: int, peak: list[int]) -> None:
    """Anonymous memory, every 20 ms, until the process has ended."""
    path = Path(f"/proc/{pid}/status")
    while True:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            return
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
        if not found:  # it has ended, and waits to be asked
            return
        peak[0] = max(peak[0], *found)
        time.sleep(0.02)


def summary(name: str, runs: Sequence[float], size: int) -> str:
    """Returns a line: the median, all runs, and the speed."""
    middle = median(runs)
    every = ", ".join(f"{seconds:.2f}" for seconds in runs)
    return f"{name:28} {middle:8.2f} s  {size / middle / 2**20:8.0f} MiB/s   ({every})"
