"""Reads the tensors of a Hugging Face checkpoint, or blocks of them, decoded on the way."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import lcm
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor

from autodeco.convert.operations import Region
from autodeco.errors import PluginError, WeightsError
from autodeco.safetensors_header import TensorInfo, read_checkpoint
from autodeco.storage import BUILT_IN, Dims, StorageFormat

PLAIN = ("F64", "F32", "F16", "BF16")
#: What a decoded tensor is rounded to where it is written.
DECODED = "BF16"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model, as a checkpoint keeps it.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: safetensors' name of the dtype that it has when it is written as one tensor.
        parts: Part -> where it is; one, ``""``, for a tensor that is stored as it is.
        format: How it is decoded; None: it is stored as it is.
    """

    name: str
    shape: Dims
    dtype: str
    parts: Mapping[str, TensorInfo]
    format: StorageFormat | None = None

    @property
    def file(self) -> Path:
        """Returns the shard with its (main) part."""
        return next(iter(self.parts.values())).file


def stored_tensors(
    infos: Mapping[str, TensorInfo], formats: Sequence[StorageFormat] = (), *, who: str = ""
) -> dict[str, StoredTensor]:
    """Finds the tensors of the model in what a checkpoint stores.

    Args:
        infos: Of `read_checkpoint`.
        formats: The plugin's own; they come before the built-in ones.
        who: The plugin, for errors.

    Raises:
        WeightsError: A part of a tensor is missing, its parts do not fit each other, or a tensor is
            stored in several ways.
    """
    found: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for name, info in infos.items():
        for one in (*formats, *BUILT_IN):
            if name.endswith(one.main.suffix) and info.dtype in one.main.dtypes:
                base = name.removesuffix(one.main.suffix)
                if one.main.suffix and not _has_other_part(base, infos, one):
                    continue  # its name ends like that by chance
                if base in found:
                    raise _stored_twice(base, info, who)
                found[base] = _in_parts(base, infos, one, who)
                used.update(
                    (part.suffix and base + part.suffix) or base for part in one.parts.values()
                )
                break
    for name, info in infos.items():
        if name not in used:
            if name in found:
                raise _stored_twice(name, info, who)
            found[name] = StoredTensor(name, info.shape, info.dtype, {"": info})
    return found


def _stored_twice(name: str, info: TensorInfo, who: str) -> WeightsError:
    return WeightsError(
        f"tensor {name!r} is stored twice, in several ways",
        who=who,
        where=str(info.file),
        fix="fetch the checkpoint again",
    )


def _has_other_part(base: str, infos: Mapping[str, TensorInfo], one: StorageFormat) -> bool:
    return any(base + part.suffix in infos for part in list(one.parts.values())[1:])


def _in_parts(
    base: str, infos: Mapping[str, TensorInfo], one: StorageFormat, who: str
) -> StoredTensor:
    parts: dict[str, TensorInfo] = {}
    for name, part in one.parts.items():
        info = infos.get(base + part.suffix)
        main = infos[base + one.main.suffix]
        if info is None:
            raise WeightsError(
                f"tensor {base + one.main.suffix!r} is stored as {one.name} ({main.dtype}), and "
                f"its {name} {base + part.suffix!r} is missing",
                who=who,
                where=str(main.file),
                fix="the checkpoint is incomplete: fetch it again",
            )
        if info.dtype not in part.dtypes:
            raise WeightsError(
                f"tensor {base + part.suffix!r} is {info.dtype}; {one.name} has "
                f"{' or '.join(part.dtypes)} there",
                who=who,
                where=str(info.file),
                fix="use a checkpoint as it was published, or write a decoder for this one",
            )
        parts[name] = info
    try:
        shape = one.shape({name: info.shape for name, info in parts.items()})
    except ValueError as error:
        raise WeightsError(
            f"tensor {base!r}: {error} ({one.name})",
            who=who,
            where=str(parts[next(iter(parts))].file),
            fix="the checkpoint is damaged or of another format: fetch it again",
        ) from error
    return StoredTensor(base, shape, DECODED, parts, one)


class ShardReader:
    """Open shards of a checkpoint; use it in a ``with`` block.

    What is stored as it is lies in the page cache until it is copied: only the bytes of a block are
    read. What is stored in parts comes decoded, in float32. Threads may share a reader.

    Args:
        path: The checkpoint directory.
        formats: The plugin's own storage formats.

    Raises:
        WeightsError: A shard is missing or broken, or a part of a tensor is missing.
    """

    def __init__(self, path: Path, formats: Sequence[StorageFormat] = ()) -> None:
        self.tensors = stored_tensors(read_checkpoint(path), formats)
        self._open: dict[Path, Any] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Returns a block of a tensor.

        Args:
            name: One of `tensors`.
            region: Start and stop in each dimension; None: all of it.

        Raises:
            PluginError: The format's decoder cannot be found, or does not give what it should.
        """
        tensor = self.tensors[name]
        region = region or tuple((0, size) for size in tensor.shape)
        if tensor.format is None:
            return self._read(name, tensor.parts[""], region)
        return self._decoded(tensor, tensor.format, region)

    def _read(self, stored: str, info: TensorInfo, region: Region) -> Tensor:
        with self._opening:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt")
        piece = self._open[info.file].get_slice(stored)
        block: Tensor = piece[tuple(slice(a, b) for a, b in region)]
        return block

    def _decoded(self, tensor: StoredTensor, how: StorageFormat, region: Region) -> Tensor:
        """Reads whole grains of each part, decodes them, and cuts off what is too much."""
        grains = [1] * len(region)
        for part, info in tensor.parts.items():
            for axis in how.axes(part, len(info.shape)):
                if axis is not None:
                    grains[axis.dim] = lcm(grains[axis.dim], axis.grain)
        wide = tuple(
            (start // grain * grain, min(size, -(-stop // grain) * grain))
            for (start, stop), grain, size in zip(region, grains, tensor.shape, strict=True)
        )
        values = {
            part: self._read(
                tensor.name + how.parts[part].suffix, info, _block(how, part, info, wide)
            )
            for part, info in tensor.parts.items()
        }
        decoded = self._decode(tensor, how, values)
        expected = tuple(stop - start for start, stop in wide)
        if tuple(decoded.shape) != expected:
            raise PluginError(
                f"the decoder of {how.name} returns the shape {tuple(decoded.shape)} for "
                f"{tensor.name!r}, expected {expected}",
                where=how.decode,
                fix="correct the decoder, or the axes of its parts",
            )
        cut = (
            slice(start - first, stop - first)
            for (start, stop), (first, _) in zip(region, wide, strict=True)
        )
        return decoded[tuple(cut)]

    def _decode(self, tensor: StoredTensor, how: StorageFormat, parts: dict[str, Tensor]) -> Tensor:
        decoded: Tensor = named_function(how.decode, how.name)(parts)
        return decoded


def _block(how: StorageFormat, part: str, info: TensorInfo, wide: Region) -> Region:
    axes = how.axes(part, len(info.shape))
    return tuple(
        (0, size)
        if axis is None
        else (wide[axis.dim][0] // axis.grain, -(-wide[axis.dim][1] // axis.grain))
        for size, axis in zip(info.shape, axes, strict=True)
    )


@lru_cache
def named_function(path: str, who: str) -> Any:
    """Imports a function by its ``module:function``.

    Raises:
        PluginError: There is none.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"the function {path!r} of {who} cannot be imported: {error}",
            fix="name it as module:function",
        ) from error
