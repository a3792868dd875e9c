"""Which process this is, as torchrun says; known before the processes have met."""

from __future__ import annotations

import os


def rank() -> int:
    """Returns this process's rank under torchrun, 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes under torchrun, 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))
