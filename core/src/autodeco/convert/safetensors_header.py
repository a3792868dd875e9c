"""Reads what a safetensors checkpoint holds from its headers alone: no tensor is loaded."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import WeightsError
from autodeco.foreign import is_plain_name, strict_json

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_MOST = 2**63 - 1  # torch counts elements and bytes in int64
_ENTRY = {"dtype", "shape", "data_offsets"}
INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".ggml", ".h5", ".msgpack", ".safetensors")
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
        file: The shard.
        dtype: safetensors' name, as ``BF16``.
        shape: Its dimensions.
        start: Offset of its first byte in the file.
        size: Bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def _broken(path: Path, what: str) -> WeightsError:
    return WeightsError(
        what, where=str(path), fix="the file is damaged or was cut short: fetch it again"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one file.

    What it accepts, the safetensors library accepts and reads alike.

    Raises:
        WeightsError: The file is missing, truncated, or its header makes no sense: a name stands
            there twice, a number is none, spans overlap or leave bytes unused.
    """
    try:
        total = path.stat().st_size
        if not path.is_file():  # a pipe would be waited for, a device never ends
            raise _broken(path, "this is no regular file")
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, total - 8):
                raise _broken(path, f"no safetensors header ({total} bytes)")
            header = strict_json(stream.read(length))
    except FileNotFoundError as error:
        raise WeightsError(
            "a shard is missing", where=str(path), fix="fetch the checkpoint again"
        ) from error
    except OSError as error:
        raise WeightsError(
            f"cannot read: {error}", where=str(path), fix="check the file"
        ) from error
    except ValueError as error:
        raise _broken(path, f"malformed safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "the safetensors header is no object")
    _check_metadata(path, header.pop("__metadata__", {}))
    infos = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_spans(path, infos, 8 + length, total)
    return infos


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "the header's __metadata__ is no table of texts")


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        if not isinstance(entry, dict) or set(entry) != _ENTRY:
            raise ValueError(f"it has not just {', '.join(sorted(_ENTRY))}")
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
            raise ValueError("shape and offsets are no lists")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise _broken(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
        if any(type(n) is not int or not 0 <= n <= _MOST for n in (*shape, *offsets)):
            raise ValueError("numbers must be whole, not negative, and below 2**63")
        if offsets[1] - offsets[0] != _size(shape, DTYPE_BYTES[dtype]):
            raise _broken(path, f"tensor {name!r}: offsets and shape disagree")
    except ValueError as error:
        raise _broken(path, f"tensor {name!r}: malformed entry: {error}") from error
    return TensorInfo(path, dtype, tuple(shape), base + offsets[0], offsets[1] - offsets[0])


def _size(shape: Sequence[int], width: int) -> int:
    """Bytes of a tensor; that of an empty one must be countable without its zero as well."""
    size = width
    for count in shape:
        size *= count or 1
        if size > _MOST:
            raise ValueError("the shape has more elements than can be counted")
    return 0 if 0 in shape else size


def _check_spans(path: Path, infos: Mapping[str, TensorInfo], start: int, total: int) -> None:
    position = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].size)):
        if info.start != position:
            raise _broken(path, f"tensor {name!r} overlaps another, or bytes are unused before it")
        position += info.size
    if position != total:
        raise _broken(path, f"the file has {total} bytes, its header says {position}")


def _no_safetensors(directory: Path) -> WeightsError:
    others = sorted(p.name for p in directory.glob("*") if p.suffix in _OTHER_FORMATS)
    return WeightsError(
        f"neither {SINGLE} nor {INDEX} is there"
        + (f", only {', '.join(others[:3])}, which is not read" if others else ""),
        where=str(directory),
        fix="give a Hugging Face checkpoint in safetensors format"
        + (": fetch it in this format, or convert it with its own tools" if others else ""),
    )


def read_index(path: Path) -> dict[str, str]:
    """Reads which shard of an index has which tensor.

    Raises:
        WeightsError: The index cannot be read, has no weight_map or names a tensor twice, or a
            shard is no plain name of a file beside it.
    """
    try:
        if path.exists() and not path.is_file():
            raise _broken(path, "this is no regular file")
        content = strict_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(path, f"unreadable or malformed index: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(path, "the index has no weight_map")
    for name, shard in weight_map.items():
        if not is_plain_name(shard):
            raise WeightsError(
                f"the index says that {name!r} is in {shard!r}, which can lie outside the "
                "directory: it is no plain file name",
                where=str(path),
                fix="do not use this checkpoint: its index is forged or damaged",
            )
    return weight_map


def read_checkpoint(directory: Path) -> dict[str, TensorInfo]:
    """Reads every header of a checkpoint, single-file or sharded.

    Raises:
        WeightsError: A file is missing or broken, the index and the shards disagree, a tensor
            stands in two shards, or the index points out of the directory.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise _no_safetensors(directory)
        return read_header(directory / SINGLE)
    weight_map = read_index(index)
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(directory / shard).items():
            if name in infos:
                raise _broken(directory / shard, f"tensor {name!r} stands in two shards")
            infos[name] = info
    for name, shard in weight_map.items():
        if name not in infos or infos[name].file.name != shard:
            raise _broken(index, f"the index says that {name!r} is in {shard}, which it is not")
    return infos
