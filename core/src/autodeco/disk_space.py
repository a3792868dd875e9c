"""Whether there is room for what is about to be written: asked before the first byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from autodeco.errors import EnvironmentProblem

_RESERVE = 64 << 20  # indexes, manifests, the filesystem's own blocks


def require_space(path: Path, size: int, what: str) -> None:
    """Checks that the filesystem of `path` has room; `path` need not exist yet.

    Args:
        path: Where it goes.
        size: Bytes to be written.
        what: What they are, for the error: "the cast checkpoint".

    Raises:
        EnvironmentProblem: They do not fit.
    """
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if size + _RESERVE > free:
        raise EnvironmentProblem(
            f"{what} needs {_gib(size)}, and {_gib(free)} are free: nothing was written",
            where=str(path),
            fix="free some space, or choose a directory on another disk",
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
