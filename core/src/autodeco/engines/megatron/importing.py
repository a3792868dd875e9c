"""A Hugging Face directory becomes a megatron-core checkpoint, written by all ranks."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console

from autodeco.convert.direct_reader import DirectReader
from autodeco.convert.small_files import copy_files, small_files
from autodeco.convert.source import checkpoint_digest
from autodeco.convert.stored import (
    HF_FILES,
    MANIFEST,
    WEIGHTS,
    Manifest,
    Part,
    Piece,
    file_crc32,
    read_manifest,
    verify,
)
from autodeco.convert.stored_writer import SourceTargets, finish, write_part
from autodeco.convert.workers import (
    BytesProgress,
    MemoryGate,
    Task,
    default_workers,
    run_tasks,
)
from autodeco.convert.working_directory import WorkingDirectory
from autodeco.disk_space import require_space
from autodeco.engines.megatron.compat import apply_cures
from autodeco.engines.megatron.engine import form_groups
from autodeco.engines.megatron.stored_layout import stored_layout
from autodeco.errors import AutodecoError, EnvironmentProblem, WeightsError
from autodeco.family import Architecture
from autodeco.files import (
    atomic_write_json,
    read_json,
    read_object,
)
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout
from autodeco.lock import FileLock
from autodeco.processes import rank, world_size

PART_BYTES = 512 << 20
HELD_BYTES = 1 << 30
_PATIENCE = datetime.timedelta(hours=12)  # ranks wait for the slowest; gloo's own limit is shorter
_PARTS = "parts"
_CPU = torch.device("cpu")
_T = TypeVar("_T")


def import_checkpoint(
    weights: ImportedWeights,
    architecture: Architecture,
    directory: Path,
    *,
    part_bytes: int = PART_BYTES,
    held_bytes: int = HELD_BYTES,
    console: Console | None = None,
) -> Manifest:
    """Makes `directory` an imported checkpoint of `weights`, or finds that it is one.

    Every rank calls it and writes its share of the parts. A killed import goes on where it
    stopped: it works in a hidden directory beside `directory`, which appears when it is complete.

    Args:
        weights: The source, in Hugging Face format, its weight map proved total.
        architecture: Its architecture.
        directory: The result; see `autodeco.convert.stored`.
        part_bytes: A file takes tensors until it has so many bytes.
        held_bytes: Of targets that a rank holds in memory together, unless one alone needs more:
            itself, and the largest of its parts.
        console: Where rank 0 shows its progress.

    Raises:
        WeightsError: `directory` is of another checkpoint or damaged, or weight map and model do
            not agree.
        RunError: Another process is importing into it.
        EnvironmentProblem: It cannot be written, or a rank does not see it.
    """
    place = WorkingDirectory(directory, "import")
    if (there := _there(weights, directory)) is not None:
        if rank() == 0:
            place.clear()
        return there
    apply_cures()
    ranks = _Ranks()
    lock: FileLock | None = None
    try:
        lock = ranks.agree(lambda: place.lock() if rank() == 0 else None)
        if (there := ranks.agree(lambda: _there(weights, directory))) is not None:
            return there  # another process made it while this one came for the lock
        console = console or Console(stderr=True, quiet=rank() != 0)
        work = _Import(weights, architecture, place, ranks, part_bytes, console)
        return work.run(MemoryGate(held_bytes))
    finally:
        if lock is not None:
            lock.remove()
        ranks.leave()


@dataclass(frozen=True)
class ImportPlan:
    """An import to be done.

    Attributes:
        keys: Stored tensors, under all their names.
        pieces: Blocks of them, one a target or more.
        parts: Files that they go into.
        size: Bytes of them.
        largest: Bytes that the largest target takes while it is read.
    """

    keys: int
    pieces: int
    parts: int
    size: int
    largest: int


def plan_import(
    weights: ImportedWeights, architecture: Architecture, *, part_bytes: int = PART_BYTES
) -> ImportPlan:
    """Plans an import from the headers of the source alone; see `import_checkpoint`.

    Raises:
        WeightsError: Weight map and model do not agree, or layers differ in their dtype.
    """
    apply_cures()
    ranks = _Ranks()
    try:
        form_groups(ParallelLayout(), _CPU)
        config = read_json(weights.path / "config.json")
        pieces, _ = stored_layout(weights, architecture, config)
        with DirectReader(weights.path, weights.formats) as reader:
            targets = SourceTargets(weights, reader, MemoryGate(HELD_BYTES))
            _check_alike(pieces, targets)
            size_of = partial(_size_of, targets)
            return ImportPlan(
                keys=len({key for piece in pieces for key in (piece.key, *piece.aliases)}),
                pieces=len(pieces),
                parts=len(split(pieces, size_of, part_bytes)),
                size=sum(map(size_of, pieces)),
                largest=max(map(targets.held, targets.rules.values())),
            )
    finally:
        ranks.leave()


def verify_checkpoint(directory: Path) -> Manifest:
    """Reads an imported checkpoint back, each rank its share, and compares all checksums.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    ranks = _Ranks()
    try:
        manifest = ranks.agree(lambda: read_manifest(directory))
        ranks.agree(lambda: verify(directory, manifest, rank=rank(), ranks=world_size()))
        return manifest
    finally:
        ranks.leave()


def _there(weights: ImportedWeights, directory: Path) -> Manifest | None:
    """Returns what was imported before; each rank finds it alone, and may be asked alone."""
    if not directory.exists():
        return None
    manifest = read_manifest(directory)
    if manifest.source != checkpoint_digest(weights.path):
        raise WeightsError(
            "the directory holds an import of another checkpoint",
            where=str(directory),
            fix="choose another directory, or remove it first",
        )
    return manifest


class _Ranks:
    """All processes of the job, which go on together or fail together."""

    def __init__(self) -> None:
        self._group: Any = None
        self._joined = not dist.is_initialized()  # or will be: then this is all they are for
        if world_size() > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def agree(self, step: Callable[[], _T]) -> _T:
        """Takes a step on every rank; where one fails, all do.

        Raises:
            AutodecoError: That of the first rank that failed, which it names.
        """
        if self._group is None:
            return step()
        result: Any = None
        problem: AutodecoError | None = None
        try:
            result = step()
        except AutodecoError as error:
            problem = error
        problems: list[Any] = [None] * world_size()
        dist.all_gather_object(problems, problem, self._group)
        for number, found in enumerate(problems):
            if found is not None:
                found.who = f"rank {number}" + (f": {found.who}" if found.who else "")
                found.agreed = True
                raise found
        value: _T = result
        return value

    def from_first(self, step: Callable[[], _T]) -> _T:
        """Takes a step on rank 0 alone and gives everyone its result."""
        box: list[Any] = [self.agree(lambda: step() if rank() == 0 else None)]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        value: _T = box[0]
        return value

    def leave(self) -> None:
        """Leaves the process groups as they were found: an engine may want others."""
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()
        elif self._group is not None:
            dist.destroy_process_group(self._group)


class _Import:
    """One call of `import_checkpoint`."""

    def __init__(
        self,
        weights: ImportedWeights,
        architecture: Architecture,
        place: WorkingDirectory,
        ranks: _Ranks,
        part_bytes: int,
        console: Console,
    ) -> None:
        self.weights, self.architecture, self.place = weights, architecture, place
        self.ranks, self.part_bytes, self.console = ranks, part_bytes, console
        self.files = place.result / WEIGHTS

    def run(self, gate: MemoryGate) -> Manifest:
        """Goes the whole way."""
        form_groups(ParallelLayout(), _CPU)
        pieces, objects = self.ranks.from_first(self._layout)
        with DirectReader(self.weights.path, self.weights.formats) as reader:
            targets = SourceTargets(self.weights, reader, gate)
            self.ranks.agree(lambda: _check_alike(pieces, targets))
            size_of = partial(_size_of, targets)
            groups = split(pieces, size_of, self.part_bytes)
            self.ranks.from_first(lambda: self._begin([sum(map(size_of, g)) for g in groups]))
            self.ranks.agree(self._check_shared)
            self.ranks.agree(lambda: self._write(groups, targets, objects))
        self.ranks.from_first(lambda: self._finish(len(groups), objects))
        return self.ranks.agree(lambda: read_manifest(self.place.output))

    def _layout(self) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
        config = read_json(self.weights.path / "config.json")
        return stored_layout(self.weights, self.architecture, config)

    def _begin(self, sizes: Sequence[int]) -> None:
        """Makes the working directory, or takes over one of the same source and plan."""
        plan = {
            "source": checkpoint_digest(self.weights.path, times=True),
            "parts": len(sizes),
            "part_bytes": self.part_bytes,
        }
        self.place.begin(plan, f"{self.files.parent.name}/{WEIGHTS}", _PARTS)
        left = (size for n, size in enumerate(sizes) if not self._record(n).exists())
        require_space(self.files, sum(left), "the imported checkpoint")

    def _check_shared(self) -> None:
        if not self.place.plan.exists():
            raise EnvironmentProblem(
                f"rank {rank()} does not see the directory that rank 0 made",
                where=str(self.place.path),
                fix="choose a directory that all machines share",
            )

    def _record(self, number: int) -> Path:
        return self.place.path / _PARTS / f"{number}.json"

    def _write(
        self, groups: Sequence[Sequence[Piece]], targets: SourceTargets, objects: Sequence[str]
    ) -> None:
        """Writes this rank's parts that are not there; those that are, are read back."""
        mine = range(rank(), len(groups), world_size())
        size = sum(_size_of(targets, piece) for number in mine for piece in groups[number])

        def write(number: int) -> int:
            if self._is_whole(number):
                return sum(_size_of(targets, piece) for piece in groups[number])
            blob = objects[0] if objects and number == 0 else None
            part = write_part(self.files, number, groups[number], targets, blob, progress.advance)
            atomic_write_json(self._record(number), part.to_json())
            return 0  # shown piece by piece

        tasks: Iterator[Task] = (partial(write, number) for number in mine)
        with BytesProgress(self.console, "import", size) as progress:
            run_tasks(tasks, default_workers(), progress)

    def _is_whole(self, number: int) -> bool:
        if not self._record(number).exists():
            return False
        try:
            part = Part.from_json(read_object(self._record(number)))
        except (WeightsError, KeyError, TypeError, ValueError):  # it is written again
            return False
        path = self.files / part.file
        return path.is_file() and file_crc32(path) == part.content.crc32

    def _finish(self, parts: int, objects: Sequence[str]) -> None:
        """Writes the metadata and the manifest, and gives the directory its name."""
        written = tuple(Part.from_json(read_json(self._record(n))) for n in range(parts))
        files = finish(self.files, written, objects)
        source, result = self.weights.path, self.place.result
        copy_files(small_files(source), source, result / HF_FILES)
        manifest = Manifest(checkpoint_digest(source), written, files)
        atomic_write_json(result / MANIFEST, manifest.to_json())
        self.place.publish()


def _size_of(targets: SourceTargets, piece: Piece) -> int:
    return piece.numel * targets.dtype(piece).itemsize


def _check_alike(pieces: Sequence[Piece], targets: SourceTargets) -> None:
    """A stored tensor stacks layers, so they must have one dtype; nothing has been written yet."""
    first: dict[str, Piece] = {}
    for piece in pieces:
        other = first.setdefault(piece.key, piece)
        if targets.dtype(piece) != targets.dtype(other):
            raise WeightsError(
                f"layers differ in their dtype: {other.target} is {targets.dtype(other)}, "
                f"{piece.target} is {targets.dtype(piece)}",
                where=piece.key,
                fix="import a checkpoint whose layers are stored alike",
            )


def split(
    pieces: Sequence[Piece], size_of: Callable[[Piece], int], limit: int
) -> list[list[Piece]]:
    """Groups pieces, in order, into parts; the targets' own order keeps reading sequential.

    A part takes pieces until it has `limit` bytes; one larger piece is a part of its own.
    """
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = size_of(piece)
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= size
    return groups


__all__ = ["MANIFEST", "PART_BYTES", "import_checkpoint", "split", "verify_checkpoint"]
