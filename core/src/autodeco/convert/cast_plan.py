"""What a cast will write: planned from the headers of the source alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import Any

from autodeco.convert.shard_writer import ShardPlan, plan_shard
from autodeco.convert.shards import PLAIN, StoredTensor, stored_tensors
from autodeco.convert.small_files import small_files
from autodeco.errors import UsageError, WeightsError
from autodeco.files import read_object
from autodeco.heads.places import model_files
from autodeco.safetensors_header import DTYPE_BYTES, INDEX, read_checkpoint
from autodeco.storage import BUILT_IN, StorageFormat

CONFIG = "config.json"
QUANTIZATION = "quantization_config"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 writes the first; published files have both
CHUNK_BYTES = 16 << 20  # glibc takes smaller blocks from a heap that it keeps: no page faults


@dataclass(frozen=True)
class CastShard:
    """One file of the result.

    Attributes:
        file: Its name, which is that of the source's file with the same (main) tensors.
        tensors: In the order of the file.
        plan: Its header, and where each tensor goes.
    """

    file: str
    tensors: tuple[StoredTensor, ...]
    plan: ShardPlan


@dataclass(frozen=True)
class CastPlan:
    """A cast to be done.

    Attributes:
        source: The checkpoint.
        shards: The files with tensors.
        config: The new ``config.json``.
        files: Small files that are copied, relative to the source.
        left_out: Files of weights that belong to no index, in whatever format.
    """

    source: Path
    shards: tuple[CastShard, ...]
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Returns the bytes of the files with tensors."""
        return sum(shard.plan.size for shard in self.shards)

    @property
    def read_size(self) -> int:
        """Returns the bytes of tensors that are read."""
        infos = (i for shard in self.shards for t in shard.tensors for i in t.parts.values())
        return sum(info.size for info in infos)

    @property
    def decoded(self) -> int:
        """Returns how many tensors are decoded; the others are copied."""
        return sum(t.format is not None for shard in self.shards for t in shard.tensors)

    @property
    def count(self) -> int:
        """Returns how many tensors there are."""
        return sum(len(shard.tensors) for shard in self.shards)


def plan_cast(
    source: Path,
    formats: Sequence[StorageFormat] = (),
    *,
    who: str = "",
    may_be_plain: bool = False,
) -> CastPlan:
    """Plans the cast of a checkpoint to bfloat16.

    Args:
        source: In Hugging Face format.
        formats: A plugin's own storage formats.
        who: The plugin, for errors.
        may_be_plain: A checkpoint in which nothing is stored in parts is none that is refused.

    Raises:
        WeightsError: A shard is missing or broken; a scale is missing, unused, or does not fit its
            tensor; a tensor has a dtype that no storage format explains.
        UsageError: Nothing is stored in parts: there is nothing to cast.
    """
    config = _config(source)
    tensors = stored_tensors(read_checkpoint(source), formats, who=who)
    _check_plain(tensors, (*formats, *BUILT_IN), who)
    if not may_be_plain and all(tensor.format is None for tensor in tensors.values()):
        raise UsageError(
            "every tensor is stored as it is: there is nothing to cast",
            where=str(source),
            fix="use the checkpoint as it is; every command takes it",
        )
    by_file: dict[str, list[StoredTensor]] = {}
    for tensor in tensors.values():
        by_file.setdefault(tensor.file.name, []).append(tensor)
    shards = tuple(_shard(file, by_file[file]) for file in sorted(by_file))
    small = small_files(source)
    known = {info.file.name for t in tensors.values() for info in t.parts.values()} | {INDEX}
    left_out = tuple(f for f in model_files(source) if f not in small and str(f) not in known)
    files = tuple(file for file in small if str(file) != CONFIG)
    return CastPlan(source, shards, config, files, left_out)


def _shard(file: str, tensors: list[StoredTensor]) -> CastShard:
    ordered = tuple(sorted(tensors, key=lambda t: next(iter(t.parts.values())).start))
    return CastShard(file, ordered, plan_shard((t.name, t.dtype, t.shape) for t in ordered))


def _check_plain(
    tensors: Mapping[str, StoredTensor], formats: Sequence[StorageFormat], who: str
) -> None:
    """Whatever no storage format has taken must be a number as it stands, and no scale."""
    for name, tensor in tensors.items():
        if tensor.format is not None:
            continue
        for one in formats:
            for part, what in list(one.parts.items())[1:]:
                if what.suffix and name.endswith(what.suffix) and tensor.dtype in what.dtypes:
                    main = name.removesuffix(what.suffix) + one.main.suffix
                    raise WeightsError(
                        f"tensor {name!r} is a {part} of {one.name}, and {main!r} is "
                        + ("not stored so" if main in tensors else "missing"),
                        who=who,
                        where=str(tensor.file),
                        fix="the checkpoint is incomplete or half converted: fetch it again",
                    )
        if tensor.dtype not in PLAIN:
            raise WeightsError(
                f"tensor {name!r} is {tensor.dtype}, and no storage format says what it stands for",
                who=who,
                where=str(tensor.file),
                fix="name the plugin that has the format (--plugin), or write a decoder: "
                "docs/plugins.md",
            )


def _config(source: Path) -> dict[str, Any]:
    """The config of the cast model: not quantised, of dtype bfloat16."""
    return unquantised(read_object(source / CONFIG), top=True)


def unquantised(config: Mapping[str, Any], *, top: bool = False) -> dict[str, Any]:
    """Returns a config without quantization and of dtype bfloat16; `top`: it is no part of one."""
    plain = {
        key: unquantised(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }
    keys = [key for key in _DTYPE_KEYS if key in plain] or (["dtype"] if top else [])
    return {**plain, **dict.fromkeys(keys, "bfloat16")}


def chunks(tensor: StoredTensor, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Yields the rows (of the first dimension) of blocks of about `limit` bytes, whole grains."""
    rows = tensor.shape[0]
    grain = 1
    if tensor.format is not None:
        for part, info in tensor.parts.items():
            for axis in tensor.format.axes(part, len(info.shape)):
                if axis is not None and axis.dim == 0:
                    grain = lcm(grain, axis.grain)
    row_bytes = prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype]
    step = max(limit // max(row_bytes * grain, 1), 1) * grain
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
