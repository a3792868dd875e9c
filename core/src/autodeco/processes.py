"""Which process this is, as torchrun says; known before the processes have met."""

from __future__ import annotations

import os
import time
from pathlib import Path


def rank() -> int:
    """Returns this process's rank under torchrun, 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes under torchrun, 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def seconds_since_start() -> float:
    """Returns how long this process has been running, its imports included.

    Where the system does not tell (it is no Linux), the time of the processor stands for it.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()
