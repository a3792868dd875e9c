"""Compares a converted checkpoint with its source, tensor by tensor, byte by byte.

What is stored in parts is decoded in float32 and rounded, not in the way that the conversion took.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from autodeco.convert.cast_plan import CastPlan, chunks
from autodeco.convert.direct_reader import DirectReader
from autodeco.convert.operations import read_target
from autodeco.convert.shards import StoredTensor
from autodeco.convert.stored_reader import StoredReader
from autodeco.convert.workers import BytesProgress, Task, default_workers, run_tasks
from autodeco.errors import WeightsError
from autodeco.hookspecs import ImportedWeights
from autodeco.safetensors_header import read_checkpoint
from autodeco.storage import StorageFormat
from autodeco.weights import BoundRule

_TARGETS_AT_ONCE = 2  # each is held twice


@dataclass(frozen=True)
class Comparison:
    """What was compared, and found equal.

    Attributes:
        tensors: How many.
        decoded: How many tensors of the source are stored in parts.
        size: Bytes of the converted tensors.
    """

    tensors: int
    decoded: int
    size: int


def compare_cast(
    plan: CastPlan,
    converted: Path,
    formats: Sequence[StorageFormat] = (),
    *,
    dropped: Container[str] = (),
    console: Console,
) -> Comparison:
    """Compares a cast, or an exported backbone, with its source.

    Args:
        plan: Of the source, by `plan_cast`.
        converted: The directory in Hugging Face format.
        formats: The plugin's own storage formats.
        dropped: Tensors of the source that may be missing: no target of the weight map has them.
        console: Where progress goes.

    Raises:
        WeightsError: A tensor is missing, is one too many, or has another dtype, shape or bytes.
    """
    tensors = {t.name: t for shard in plan.shards for t in shard.tensors}
    infos = read_checkpoint(converted)
    for name in [name for name in tensors if name in dropped and name not in infos]:
        del tensors[name]
    _same_names(tensors, infos, converted)
    for name, tensor in tensors.items():
        found = (infos[name].dtype, infos[name].shape)
        if found != (tensor.dtype, tensor.shape):
            raise WeightsError(
                f"{name!r} is {found[0]} {list(found[1])}, expected {tensor.dtype} "
                f"{list(tensor.shape)}",
                where=str(infos[name].file),
                fix="convert the source again",
            )
    size = sum(infos[name].size for name in tensors)
    with (
        DirectReader(plan.source, formats, plainly=True) as source,
        DirectReader(converted) as result,
        BytesProgress(console, "verify", size) as progress,
    ):
        run_tasks(_blocks(tensors.values(), source, result), default_workers(), progress)
    return Comparison(len(tensors), sum(t.format is not None for t in tensors.values()), size)


def _blocks(
    tensors: Iterable[StoredTensor], source: DirectReader, result: DirectReader
) -> Iterator[Task]:
    for tensor in tensors:
        for rows in chunks(tensor) if tensor.shape else [(0, 0)]:
            yield partial(_compare_block, tensor, rows, source, result)


def _compare_block(
    tensor: StoredTensor, rows: tuple[int, int], source: DirectReader, result: DirectReader
) -> int:
    region = (rows, *((0, size) for size in tensor.shape[1:])) if tensor.shape else None
    expected, found = source.read(tensor.name, region), result.read(tensor.name, region)
    return _same_bytes(tensor.name, expected, found, result.tensors[tensor.name].file, rows[0])


def compare_import(weights: ImportedWeights, directory: Path, *, console: Console) -> Comparison:
    """Compares an imported checkpoint with its source.

    Args:
        weights: The source, its weight map proved total.
        directory: The imported checkpoint.
        console: Where progress goes.

    Raises:
        WeightsError: A target is missing, or has another dtype, shape or bytes.
    """
    rules = weights.weight_map.rules
    with (
        DirectReader(weights.path, weights.formats, plainly=True) as source,
        StoredReader(directory) as result,
    ):
        names = {rule.target for rule in rules}
        _same_names(names, result.targets(), directory)
        size = result.size()

        def compare(rule: BoundRule) -> int:
            expected = read_target(rule, weights.shape, source)
            found = result.read(rule.target)
            return _same_bytes(rule.target, expected, found, directory)

        with BytesProgress(console, "verify", size) as progress:
            run_tasks((partial(compare, rule) for rule in rules), _TARGETS_AT_ONCE, progress)
        decoded = sum(t.format is not None for t in source.tensors.values())
    return Comparison(len(rules), decoded, size)


def _same_names(expected: Iterable[str], found: Iterable[str], where: Path) -> None:
    wanted, there = set(expected), set(found)
    for names, what in ((wanted - there, "are missing"), (there - wanted, "are not the source's")):
        if names:
            raise WeightsError(
                f"{len(names)} tensors {what}, the first is {min(names)!r}",
                where=str(where),
                fix="convert the source again",
            )


def _same_bytes(name: str, expected: Tensor, found: Tensor, where: Path, row: int = 0) -> int:
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        raise WeightsError(
            f"{name!r} is {found.dtype} {list(found.shape)}, expected {expected.dtype} "
            f"{list(expected.shape)}",
            where=str(where),
            fix="convert the source again",
        )
    one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (expected, found))
    if not torch.equal(one, other):
        place = int((one != other).nonzero()[0]) // expected.element_size()
        index = [int(i) for i in torch.unravel_index(torch.tensor(place), expected.shape)]
        if index:
            index[0] += row
        values = (t.contiguous().view(-1)[place].item() for t in (expected, found))
        raise WeightsError(
            f"{name!r} differs at {index}: the source has {next(values)}, here is {next(values)}",
            where=str(where),
            fix="the copy is damaged: remove it and convert the source again",
        )
    return one.numel()
