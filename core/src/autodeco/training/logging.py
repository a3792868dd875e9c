"""Where the numbers of a run go: metrics.jsonl always, a tracker when asked, the screen."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from autodeco.errors import EnvironmentProblem
from autodeco.files import atomic_write_text

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a torn last line, left by a kill, is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class MetricsLog:
    """Appends to metrics.jsonl and to a tracker.

    Args:
        directory: The run directory.
        step: Steps done when it is opened; later rows, of an interrupted run, are cut off.
        track: none, tensorboard or wandb.
        config: Recorded by the tracker.

    Raises:
        EnvironmentProblem: The tracker's package is not installed.
    """

    def __init__(self, directory: Path, step: int, track: str, config: Mapping[str, Any]) -> None:
        self._path = directory / METRICS
        rows = [row for row in read_metrics(self._path) if row.get("step", 0) <= step]
        if step == 0:
            rows = []
        atomic_write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = self._path.open("a", encoding="utf-8")
        self._tracker = _tracker(track, directory, dict(config))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; ``kind`` is train or eval."""
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._stream.flush()
        if self._tracker is not None:
            self._tracker(step, {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def _tracker(track: str, directory: Path, config: dict[str, Any]) -> Any:
    if track == "none":
        return None
    try:
        if track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"))

            def add(step: int, values: Mapping[str, float]) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            return add
        import wandb

        run_id = "-".join(directory.parts[-2:])
        run = wandb.init(dir=str(directory), id=run_id, name=run_id, config=config, resume="allow")
        return lambda step, values: run.log(dict(values), step=step)
    except ImportError as error:
        raise EnvironmentProblem(
            f"--track {track} needs a package that is not installed: {error.name}",
            fix="pip install autodeco[track], or leave --track out",
        ) from error


class ProgressLine:
    """A rich bar on a terminal; elsewhere one plain line every `seconds`."""

    def __init__(self, console: Console, total: int, done: int, seconds: float) -> None:
        self._console, self._total, self._seconds = console, total, seconds
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total, completed=done)

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a step."""
        text = f"loss {values['loss']:.4f} T {values['temperature_mean']:.3f} " + (
            f"P {values['top_p_mean']:.3f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._console.print(f"  step {step}/{self._total} {text}", highlight=False)
