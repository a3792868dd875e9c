"""What we have run ourselves: the support matrix, as data.

`docs/support-matrix.md` is held to it by a test, and the tests' own layouts are held to it too. A
combination that is in no row of state `RUN` is announced once, when it starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from autodeco.layout import ParallelLayout
from autodeco.processes import rank, world_size

if TYPE_CHECKING:
    from rich.console import Console

PYTHON = (3, 11)
MEGATRON = ">=0.16,<0.17"

RUN = "run"
SIMULATED = "simulated"
NEVER = "never run"

_CPU = {"torch": "2.13.0", "transformers": "5.23.0"}
_MEGATRON_CPU = {**_CPU, "megatron-core": "0.16.1"}
_GPU = {"torch": "2.11.0", "transformers": "5.17.0"}
_MEGATRON_GPU = {**_GPU, "megatron-core": "0.16.1"}
_GLOO = "gloo, one machine"
_NCCL = "two NVIDIA H100 of one machine, NCCL, torch for CUDA 13.0"


@dataclass(frozen=True)
class Combination:
    """One row of the matrix.

    Attributes:
        engine: ``hf`` or ``megatron``.
        layout: As ``--layout`` writes it; "any" in rows that say what was never run.
        ranks: Up to this many processes; what the layout leaves is data parallel.
        device: ``cpu`` or ``cuda``.
        state: `RUN`, `SIMULATED` or `NEVER`.
        versions: Package -> version that it was run with.
        note: How, or what exactly.
    """

    engine: str
    layout: str
    ranks: int
    device: str
    state: str
    versions: Mapping[str, str]
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Returns the row as the page has it."""
        with_what = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        ranks = str(self.ranks) if self.ranks else "any"
        cells = (self.engine, self.layout, ranks, self.device, self.state, with_what, self.note)
        return tuple(cell or "-" for cell in cells)


def _on_cpu(layout: str, ranks: int) -> Combination:
    return Combination("megatron", layout, ranks, "cpu", RUN, _MEGATRON_CPU, _GLOO)


def _on_two_gpus(layout: str) -> Combination:
    return Combination("megatron", layout, 2, "cuda", RUN, _MEGATRON_GPU, _NCCL)


MATRIX: tuple[Combination, ...] = (
    Combination("hf", "tp=1", 1, "cpu", RUN, _CPU),
    Combination("hf", "tp=1", 2, "cpu", RUN, _CPU, "data parallel, gloo, one machine"),
    Combination("hf", "tp=1", 1, "cuda", RUN, _GPU, "one NVIDIA H200, torch for CUDA 13.0"),
    Combination("hf", "tp=1", 2, "cuda", RUN, _GPU, f"data parallel, {_NCCL}"),
    _on_cpu("tp=1", 2),
    _on_cpu("tp=2", 4),
    _on_cpu("pp=2", 4),
    _on_cpu("ep=2", 4),
    _on_cpu("ep=4", 4),
    _on_cpu("tp=2,pp=2", 8),
    _on_cpu("tp=2,ep=2", 4),
    _on_cpu("pp=2,ep=2", 8),
    _on_cpu("tp=2,pp=2,ep=2", 8),
    _on_cpu("cp=2", 2),
    _on_cpu("cp=4", 4),
    _on_cpu("tp=2,cp=2", 4),
    _on_cpu("pp=2,cp=2", 4),
    _on_cpu("ep=2,cp=2", 4),
    Combination(
        *("megatron", "pp=8,ep=8", 64, "cuda", SIMULATED, {"megatron-core": "0.16.1"}),
        "models of ranks of 64 built without weights under a fake group; nothing computed",
    ),
    Combination(
        *("megatron", "tp=1", 1, "cuda", RUN, _MEGATRON_GPU),
        "one NVIDIA H100, torch for CUDA 13.0",
    ),
    _on_two_gpus("tp=1"),
    _on_two_gpus("tp=2"),
    _on_two_gpus("pp=2"),
    _on_two_gpus("ep=2"),
    _on_two_gpus("cp=2"),
    Combination("hf", "any", 0, "cuda", NEVER, {}, "NCCL with more than 2 GPUs"),
    Combination("megatron", "any", 0, "cuda", NEVER, {}, "NCCL with more than 2 GPUs"),
    Combination("megatron", "any", 0, "cuda", NEVER, {}, "Transformer Engine"),
    Combination("megatron", "any", 0, "cuda", NEVER, {}, "Apex"),
    Combination("hf", "any", 0, "cpu", NEVER, {}, "more than one machine"),
    Combination("megatron", "any", 0, "cpu", NEVER, {}, "more than one machine"),
)


def never_run(
    engine: str,
    layout: ParallelLayout,
    device: str,
    *,
    ranks: int = 1,
    machines: int = 1,
    versions: Mapping[str, str] | None = None,
    transformer_engine: bool = False,
) -> str | None:
    """Says what of a combination we have never run.

    Args:
        engine: ``hf`` or ``megatron``.
        layout: How the model is spread.
        device: ``cpu`` or ``cuda``.
        ranks: All processes.
        machines: Over this many machines.
        versions: Installed versions; a minor version that no row has counts too.
        transformer_engine: Whether its kernels are used.

    Returns:
        One sentence, or None: a row of the matrix covers it.
    """
    size = _sizes(layout)
    reasons = []
    if machines > 1:
        reasons.append(f"{machines} machines")
    same = [c for c in MATRIX if c.engine == engine and c.device == device and c.state == RUN]
    most = max((c.ranks for c in same), default=1)
    if device == "cuda" and ranks > most:
        reasons.append(f"NCCL with more than {most} GPUs")
    if transformer_engine:
        reasons.append("Transformer Engine")
    fitting = [c for c in same if _sizes(ParallelLayout.parse(c.layout)) == size]
    if not any(ranks <= c.ranks for c in fitting):
        processes = "1 process" if ranks == 1 else f"{ranks} processes"
        reasons.append(f"the {engine} engine with {layout} on {device}, {processes}")
    reasons += _other_versions(same, versions or {})
    return f"never run by us: {'; '.join(reasons)} (see the support matrix)" if reasons else None


def _sizes(layout: ParallelLayout) -> tuple[int, ...]:
    return layout.tensor, layout.pipeline, layout.context, layout.expert


def _other_versions(rows: list[Combination], versions: Mapping[str, str]) -> list[str]:
    """Returns the packages whose minor version no row has."""
    found = []
    for name in dict.fromkeys(name for row in rows for name in row.versions):
        known = {_minor(row.versions[name]) for row in rows if name in row.versions}
        if name in versions and _minor(versions[name]) not in known:
            found.append(f"{name} {versions[name]}")
    return found


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def installed(*names: str) -> dict[str, str]:
    """Returns the versions of those of these distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def announce(engine: Any, console: Console) -> None:
    """Says once, on rank 0, when a run is of a combination that we have never run.

    Args:
        engine: The engine that has been built.
        console: Where it is said.
    """
    machines = -(-world_size() // int(os.environ.get("LOCAL_WORLD_SIZE") or world_size()))
    said = never_run(
        engine.name,
        getattr(engine, "layout", ParallelLayout()),
        engine.device.type,
        ranks=world_size(),
        machines=machines,
        versions=installed(*{name for row in MATRIX for name in row.versions}),
        transformer_engine=bool(getattr(engine, "transformer_engine", False)),
    )
    if said and rank() == 0:
        console.print(said, style="yellow", highlight=False, markup=False)
