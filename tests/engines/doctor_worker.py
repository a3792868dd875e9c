"""One rank of `test_doctor_distributed`: the command, with one rank made ill."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autodeco.cli import main
from autodeco.doctor import distributed, meeting, model


def ill(kind: str) -> None:
    """Makes this rank fail in one of the ways that machines fail in."""
    if kind == "raises":

        def broken(*_: Any) -> Iterator[Any]:
            raise RuntimeError("the card has fallen off the bus")

        distributed._all_reduce = broken
    elif kind == "hangs":
        distributed._all_reduce = lambda *_: time.sleep(600)  # type: ignore[assignment, return-value]
    elif kind == "dies":
        distributed._all_reduce = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    elif kind == "differs":
        true, versions = model.difference, distributed.installed
        model.difference = lambda *a: (true(*a) or 0.0) + 0.25
        distributed.installed = lambda *n: {**versions(*n), "torch": "9.9"}
        distributed._APPEARS = 1.0
        elsewhere = Path("elsewhere")
        elsewhere.mkdir()
        os.chdir(elsewhere)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        meeting.socket.gethostname = lambda: "ill-host"
        ill(sys.argv[1])
    main(sys.argv[2:])
