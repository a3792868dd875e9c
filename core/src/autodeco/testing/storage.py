"""Checks of storage formats: what an encoder wrote, a decoder reads, whole or block by block."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file
from torch import Tensor

from autodeco.convert.operations import Region
from autodeco.convert.random_checkpoint import stored
from autodeco.convert.shards import ShardReader
from autodeco.family import Architecture, ModelPreset
from autodeco.testing.checks import CheckFailed
from autodeco.testing.context import WEIGHTS, Context

# MXFP4 keeps three bits: about a tenth of a value drawn from a normal distribution is lost
ROUNDING = 0.2


def formats(context: Context) -> str:
    """One tensor of each pattern of `Architecture.stored`, written to a file and read."""
    worst: dict[str, float] = {}
    blocks = 0
    for preset in context.random_presets:
        architecture = context.architecture(preset)
        for pattern, name in architecture.stored.items():
            loss, count = _one(context, preset, architecture, pattern, name)
            worst[name] = max(loss, worst.get(name, 0.0))
            blocks += count
    if not worst:
        return "every tensor is stored as it is"
    said = ", ".join(f"{name} loses {loss:.1%}" for name, loss in worst.items())
    return f"{said}; {blocks} blocks like the whole"


def _one(
    context: Context, preset: ModelPreset, architecture: Architecture, pattern: str, how: str
) -> tuple[float, int]:
    sizes = context.sizes(preset)
    matching = sorted(name for name in sizes if re.fullmatch(pattern, name))
    where = f"preset {preset.name}, Architecture.stored[{pattern!r}] = {how!r}"
    if not matching:
        raise CheckFailed(
            "the pattern matches no tensor of the weight map",
            where=where,
            fix="correct the regular expression; it must match the whole name",
        )
    name = max(matching, key=lambda n: len(sizes[n]))
    value = _uneven(sizes[name])
    directory = context.work / f"stored-{preset.name}-{abs(hash(pattern))}"
    directory.mkdir()
    parts = stored(architecture, context.family.formats, name, value, torch.float32)
    save_file({k: v.contiguous() for k, v in parts.items()}, directory / WEIGHTS)
    with ShardReader(directory, context.family.formats) as reader:
        if name not in reader.tensors:
            raise CheckFailed(
                f"{name!r} is stored as {', '.join(parts)}, which nothing recognises",
                where=where,
                fix="correct the parts of the StorageFormat: suffixes and dtypes",
            )
        whole = reader.read(name).float()
        loss = _loss(whole, value)
        if not loss <= ROUNDING:
            raise CheckFailed(
                f"{name!r} comes back with an error of {loss:.1%}, more than {ROUNDING:.0%}",
                where=where,
                fix="correct decode or encode of the StorageFormat: a scale may be left out",
            )
        regions = list(_regions(tuple(value.shape)))
        for region in regions:
            _same(reader.read(name, region).float(), whole, region, f"{where}, {name}")
    return loss, len(regions)


def _uneven(size: tuple[int, ...]) -> Tensor:
    """Random numbers whose order of magnitude differs from block to block."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(size, generator=generator) * 0.05
    for dim, length in enumerate(size):
        shape = [1] * len(size)
        shape[dim] = length
        value = value * torch.exp2(-(torch.arange(length) * 8 // length).float()).view(shape)
    return value


def _loss(found: Tensor, value: Tensor) -> float:
    """The norm of the error, by that of the values; infinite where the shapes differ."""
    if found.shape != value.shape:
        return float("inf")
    return float((found - value).norm() / value.norm())


def _regions(size: tuple[int, ...]) -> list[Region]:
    """Blocks that begin and end anywhere, one in each dimension and one in all."""
    full = tuple((0, length) for length in size)
    cut = tuple((length // 3, max(length // 3 + 1, length - length // 4)) for length in size)
    one = [(*full[:dim], cut[dim], *full[dim + 1 :]) for dim in range(len(size))]
    return [*one, cut]


def _same(block: Tensor, whole: Tensor, region: Region, where: str) -> None:
    expected = whole[tuple(slice(start, stop) for start, stop in region)]
    if not torch.equal(block, expected):
        raise CheckFailed(
            f"the block {region} is not that of the whole tensor",
            where=where,
            fix="correct the axes of the parts of the StorageFormat: dimension and grain",
        )
