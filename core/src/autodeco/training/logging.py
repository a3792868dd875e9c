"""Where the numbers of a run go: metrics.jsonl always, a tracker when asked, the screen."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from autodeco.errors import EnvironmentProblem, RunError
from autodeco.files import atomic_write_text, write_problem
from autodeco.progress import TerminalBar

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a torn last line, left by a kill, is passed over.

    Raises:
        RunError: Another line is malformed.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise RunError(
                    f"malformed metrics: {error}",
                    where=f"{path}:{number}",
                    fix="remove the line, then run again",
                ) from error
    return rows


def _row(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("no row with a step")
    return row


class MetricsLog:
    """Appends to metrics.jsonl and to a tracker.

    Args:
        directory: The run directory.
        step: Steps done when it is opened, None for a fresh start; later rows, of an interrupted
            run, are cut off.
        track: none, tensorboard or wandb.
        config: Recorded by the tracker.

    Raises:
        EnvironmentProblem: The tracker's package is not installed, or the file cannot be written.
    """

    def __init__(
        self, directory: Path, step: int | None, track: str, config: Mapping[str, Any]
    ) -> None:
        self._path = directory / METRICS
        rows = [] if step is None else read_metrics(self._path)
        kept = [row for row in rows if row["step"] <= (step or 0)]
        self._tracker = _tracker(track, directory, dict(config), step or 0)
        atomic_write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            self._stream = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_problem(error, self._path) from error

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; ``kind`` is train or eval.

        Raises:
            EnvironmentProblem: It cannot be written.
        """
        try:
            self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise write_problem(error, self._path) from error
        if self._tracker is not None:
            self._tracker.add(step, {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Closes the file and the tracker."""
        with contextlib.suppress(OSError):  # what could not be flushed was reported by `write`
            self._stream.close()
        if self._tracker is not None:
            self._tracker.close()


class _Tracker(Protocol):
    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else None  # what an interrupted run logged after its checkpoint
        self._writer: Any = SummaryWriter(str(directory / "logs"), purge_step=purge)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        name = "-".join(directory.resolve().parts[-2:])
        kept = directory / "logs" / "wandb-id"  # a run that was moved keeps its id
        if not kept.exists():
            atomic_write_text(kept, re.sub(r"[^\w.-]", "-", name)[-128:])
        try:
            self._run: Any = wandb.init(
                dir=str(directory),
                id=kept.read_text(),
                name=name,
                config=dict(config),
                resume="allow",
            )
        except Exception as error:  # it has many kinds: no login, no network, a full disk
            raise EnvironmentProblem(
                f"wandb cannot start: {error}",
                fix="log in, or set WANDB_MODE=offline and send the run later with `wandb sync`",
            ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def require_tracker(track: str) -> None:
    """Checks that a tracker's package is installed, without importing it.

    Raises:
        EnvironmentProblem: It is not.
    """
    if track != "none" and importlib.util.find_spec(track) is None:
        raise _no_tracker(track, track)


def _no_tracker(track: str, package: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"--track {track} needs a package that is not installed: {package}",
        fix="pip install autodeco[track], or leave --track out",
    )


def _tracker(track: str, directory: Path, config: dict[str, Any], step: int) -> _Tracker | None:
    if track == "none":
        return None
    try:
        return (
            _TensorBoard(directory, step) if track == "tensorboard" else _Wandb(directory, config)
        )
    except ImportError as error:
        raise _no_tracker(track, error.name or track) from error


class ProgressLine(TerminalBar):
    """The training's bar; without a terminal one plain line every `seconds`."""

    def __init__(self, console: Console, total: int, done: int, seconds: float) -> None:
        super().__init__(console, "training", total, done)
        self._console, self._total, self._seconds = console, total, seconds
        self._last = time.monotonic()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a step."""
        text = f"loss {values['loss']:.4f} T {values['temperature_mean']:.3f} " + (
            f"P {values['top_p_mean']:.3f}"
        )
        if self.shown(completed=step, description=text):
            return
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._console.print(f"  step {step}/{self._total} {text}", highlight=False)
