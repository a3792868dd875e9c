"""The random presets on two processes: tensor, pipeline and expert parallel, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodeco.errors import UsageError
from autodeco.family import ModelPreset
from autodeco.testing.checks import CheckFailed
from autodeco.testing.context import Context
from autodeco.testing.layouts import RANKS, for_layers
from autodeco.testing.logits import Difference, logits_of, some_batch

SECONDS = 300.0
_SIZES = "give a random preset sizes that two ranks can share, or name other `layouts`"
_SHOWN = 12  # lines of what a worker said


@dataclass(frozen=True)
class Case:
    """A preset at a layout.

    Attributes:
        preset: Its name.
        layout: As ``--layout`` writes it.
        model: The checkpoint.
        reference: A file with the hf engine's logits.
    """

    preset: str
    layout: str
    model: str
    reference: str


def layouts_of_two(context: Context) -> str:
    """Starts two processes that go through all presets and layouts."""
    cases = _cases(context)
    reports = launch(context, cases)
    worst: dict[str, float] = {}
    for case, report in zip(cases, reports, strict=True):
        where = f"preset {case.preset}, layout {case.layout}, {RANKS} processes, against hf"
        Difference(report["difference"], report["limit"], where).check(
            "a rule's parallel_dim does not say how megatron-core splits its target"
        )
        key = case.layout.partition(",")[0]
        worst[key] = max(report["difference"], worst.get(key, 0.0))
    said = ", ".join(f"{layout} {difference:.1e}" for layout, difference in worst.items())
    return f"{len(cases)} cases on {RANKS} processes, largest differences: {said}"


def _cases(context: Context) -> list[Case]:
    presets = context.megatron_presets()
    cases = []
    for text in context.layouts:
        fitting = []
        reasons: list[CheckFailed] = []
        for preset in presets:
            layout = for_layers(text, preset.shape.num_layers)
            try:
                layout.data_ranks(preset.shape, RANKS)
            except UsageError as error:
                where = f"preset {preset.name}, {error.where}"
                reasons.append(CheckFailed(error.what, where=where, fix=_SIZES))
            else:
                fitting.append(_case(context, preset, str(layout)))
        sparse = any(preset.shape.num_experts for preset in presets)
        if not fitting and (sparse or "ep=" not in text):
            raise reasons[0]
        cases += fitting
    return cases


def _case(context: Context, preset: ModelPreset, layout: str) -> Case:
    file = context.work / f"reference-{preset.name}.pt"
    if not file.exists():
        batch = some_batch(preset.shape.vocab_size)
        torch.save(logits_of(context.engine(preset, "hf"), batch), file)
    return Case(preset.name, layout, str(context.model(preset)), str(file))


def launch(
    context: Context, cases: Sequence[Case], *, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Runs cases on two processes, one after the other in one group.

    Raises:
        CheckFailed: A process failed, or did not end in time; the message has its last lines.
    """
    with tempfile.TemporaryDirectory(dir=context.work) as place:
        root = Path(place)
        order = {
            "plugin": context.locator,
            "meeting": f"file://{root / 'meeting'}",
            "cases": [vars(case) for case in cases],
            "report": str(root / "report.json"),
        }
        (root / "order.json").write_text(json.dumps(order))
        _wait([_start(root, rank) for rank in range(RANKS)], root, seconds)
        reports: list[dict[str, Any]] = json.loads((root / "report.json").read_text())
    return reports


def _start(root: Path, rank: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "autodeco.testing.worker", str(root / "order.json")]
    with (root / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _wait(workers: list[subprocess.Popen[bytes]], root: Path, seconds: float) -> None:
    """Waits for all; when one fails, or time is up, the others are killed."""
    end = time.monotonic() + seconds
    try:
        while any(worker.poll() is None for worker in workers):
            failed = [r for r, worker in enumerate(workers) if worker.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
        codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    wrong = [r for r, code in enumerate(codes) if code not in (None, 0)]
    late = [r for r, code in enumerate(codes) if code is None]
    if not wrong and not late:
        return
    rank = (wrong or late)[0]
    lines = (root / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
    said = "\n".join(lines[-_SHOWN:]) or "nothing"
    what = "failed" if wrong else f"did not end in {seconds:.0f} s and was killed"
    raise CheckFailed(
        f"process {rank} of {RANKS} {what}; it said:\n{said}",
        where=str(root / "order.json"),
        fix="try the layout alone: layouts=('tp=2',); ranks that wait for each other hang",
    )
