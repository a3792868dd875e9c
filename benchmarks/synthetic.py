"""Checkpoints of any size with the names, shapes, dtypes and storage formats of published ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autodeco.convert.shard_writer import ShardWriter, plan_shard
from autodeco.family import FamilySpec, ModelPreset
from autodeco.safetensors_header import INDEX
from autodeco.storage import BUILT_IN, StorageFormat
from autodeco.weights import source_sizes

Dims = tuple[int, ...]
Entry = tuple[str, str, Dims]
_BLOCK = 32 << 20


def entries(family: FamilySpec, preset: ModelPreset) -> Iterator[Entry]:
    """Yields name, dtype and shape of every stored tensor of a preset, in the order of its layers.

    A family that drops a layer behind the last one gets it: a copy of the last one's names.
    """
    sizes = source_sizes(family.weight_map.expand(preset.shape))
    last, behind = (f"model.layers.{preset.shape.num_layers - n}." for n in (1, 0))
    more = {n.replace(last, behind): s for n, s in sizes.items() if n.startswith(last)}
    if any(drop.matches(name, preset.shape) for name in more for drop in family.weight_map.drops):
        sizes |= more
    formats = {one.name: one for one in (*family.formats, *BUILT_IN)}
    stored = family.architecture(preset.architecture).stored
    for name, shape in sizes.items():
        plain = name.replace(behind, last)
        how = next((h for pattern, h in stored.items() if re.fullmatch(pattern, plain)), "BF16")
        if how in formats:
            yield from _parts(name, shape, formats[how])
        else:
            yield name, how, shape


def _parts(name: str, shape: Dims, how: StorageFormat) -> Iterator[Entry]:
    for number, (part, what) in enumerate(how.parts.items()):
        axes = how.axes(part, len(shape))
        # a dimension of its own: what is left of the others' elements, two in a byte (MXFP4)
        sizes = [16 if axis is None else -(-shape[axis.dim] // axis.grain) for axis in axes]
        yield name + what.suffix, what.dtypes[0], tuple(sizes)
        assert number or len(sizes) >= len(shape)


def write(
    family: FamilySpec, preset: ModelPreset, directory: Path, shards: int, *, sparse: bool
) -> Path:
    """Writes such a checkpoint.

    Args:
        family: The plugin's data.
        preset: Its shape.
        directory: To be made.
        shards: Files.
        sparse: Headers alone, and holes behind them; else random bytes.
    """
    directory.mkdir(parents=True)
    every = list(entries(family, preset))
    each = -(-len(every) // shards)
    block = np.random.default_rng(0).standard_normal(_BLOCK // 4, dtype=np.float32).tobytes()
    table: dict[str, str] = {}
    for number in range(0, len(every), each):
        mine = every[number : number + each]
        file = f"model-{number // each + 1:05}-of-{shards:06}.safetensors"
        plan = plan_shard(mine)
        table |= {name: file for name, _, _ in mine}
        if sparse:
            with (directory / file).open("wb") as stream:
                stream.write(plan.header)
                stream.truncate(plan.size)
            continue
        with ShardWriter(directory / file, plan) as writer:
            for name, span in plan.tensors.items():
                for at in range(0, span.size, _BLOCK):
                    writer.write(name, at, block[: span.size - at])
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = family.architecture(preset.architecture).config_json(preset.shape, preset.config)
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return directory
