"""Reads what a safetensors checkpoint holds from its headers alone: no tensor is loaded."""

from __future__ import annotations

import contextlib
import gc
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from autodeco.errors import WeightsError
from autodeco.files import fetch_hint
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
_METADATA = "__metadata__"


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


@dataclass(frozen=True)
class Header:
    """The header of one file, checked.

    Attributes:
        tensors: Name -> where it is, in the order of the header.
        raw: The JSON as it stands in the file, padding included.
        start: Offset of the first byte of the data: 8 + the length of `raw`.
        size: Bytes of the file.
    """

    tensors: Mapping[str, TensorInfo]
    raw: bytes
    start: int
    size: int

    def content(self) -> dict[str, Any]:
        """Returns the JSON, parsed; the keys in the order of the file."""
        return cast(dict[str, Any], json.loads(self.raw))


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
    return dict(read_whole_header(path).tensors)


def read_whole_header(path: Path) -> Header:
    """Reads and checks the header of one file, and keeps its bytes; raises as `read_header`."""
    try:
        total = path.stat().st_size
        if not path.is_file():  # a pipe would be waited for, a device never ends
            raise _broken(path, "this is no regular file")
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, total - 8):
                raise _broken(path, f"no safetensors header ({total} bytes)")
            raw = stream.read(length)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path.name} is missing", where=str(path), fix="fetch the checkpoint again, complete"
        ) from error
    except OSError as error:
        raise WeightsError(
            f"cannot read: {error}", where=str(path), fix="check the file"
        ) from error
    return parse_header(path, raw, total)


def parse_header(path: Path, raw: bytes, total: int) -> Header:
    """Checks a header.

    Args:
        path: The file that it is of.
        raw: Its JSON, padding included.
        total: Bytes of the file.

    Raises:
        WeightsError: It is malformed, or does not describe every byte of the file once.
    """
    try:
        header = strict_json(raw)
    except ValueError as error:
        raise _broken(path, f"malformed safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "the safetensors header is no object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, f"{_METADATA} of the safetensors header holds more than text")
    start = 8 + len(raw)
    infos = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    _check_spans(path, infos, start, total)
    return Header(infos, raw, start, total)


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
        fix=fetch_hint(directory)
        or "give a Hugging Face checkpoint in safetensors format"
        + (": fetch it in this format, or convert it with its own tools" if others else ""),
    )


def read_index(directory: Path) -> dict[str, Any]:
    """Reads the index of a sharded checkpoint: ``weight_map``, from tensor to shard, is checked.

    Raises:
        WeightsError: It is missing or malformed, it names a tensor twice, or a shard that is no
            plain file name: nothing outside the directory is ever opened.
    """
    path = directory / INDEX
    try:
        if path.exists() and not path.is_file():
            raise _broken(path, "this is no regular file")
        content = strict_json(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError("the index is missing", where=str(path), fix="fetch it again") from error
    except OSError as error:
        raise WeightsError(f"cannot read: {error}", where=str(path), fix="check it") from error
    except ValueError as error:
        raise _broken(path, f"malformed index: {error}") from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise _broken(path, "the index has no weight_map")
    plain: set[str] = set()  # a shard has a thousand tensors
    for name, shard in table.items():
        if isinstance(shard, str) and shard in plain:
            continue
        if not is_plain_name(shard):
            raise WeightsError(
                f"the index points to {shard!r} for {name!r}, outside the directory",
                where=str(path),
                fix="do not use this checkpoint: its index is forged or damaged",
            )
        plain.add(shard)
    return cast(dict[str, Any], content)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from looking through a hundred thousand new entries in vain."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_checkpoint(directory: Path) -> dict[str, TensorInfo]:
    """Reads every header of a checkpoint, single-file or sharded.

    Raises:
        WeightsError: A file is missing or broken, the index and the shards disagree about a tensor
            (either has it alone, or it stands in two shards), or the index points out of the
            directory.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise _no_safetensors(directory)
        return read_header(directory / SINGLE)
    with _no_collection():
        return _read_shards(directory)


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    index, weight_map = directory / INDEX, read_index(directory)["weight_map"]
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_whole_header(directory / shard).tensors.items():
            if name in infos:
                raise _broken(directory / shard, f"tensor {name!r} stands in two shards")
            if name not in weight_map:
                raise _broken(directory / shard, f"the index does not name the tensor {name!r}")
            infos[name] = info
    for name, shard in weight_map.items():
        if name not in infos or infos[name].file.name != shard:
            raise _broken(index, f"the index says that {name!r} is in {shard}, which it is not")
    return infos
