"""Safetensors shards: names, single tensors, and renaming without touching the data."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from autodeco.errors import WeightsError
from autodeco.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_BLOCK = 16 << 20
_ALIGN = 8


def read_weight_map(directory: Path) -> dict[str, str]:
    """The index's table from tensor name to shard; no shard may lie outside the directory.

    Raises:
        WeightsError: malformed, or a shard's name is not a plain file name.
    """
    index = read_json(directory / INDEX_FILE)
    table = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(table, Mapping) or not table:
        raise WeightsError(
            "the index has no weight_map",
            where=str(directory / INDEX_FILE),
            fix="fetch the checkpoint again, complete",
        )
    for name, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise WeightsError(
                f"tensor {name} points to {shard!r}, which is not a file of this directory",
                where=str(directory / INDEX_FILE),
                fix="do not use this checkpoint: its index is forged or damaged",
            )
    return dict(cast(Mapping[str, str], table))


def _unreadable(file: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"not a complete safetensors file: {error}",
        where=str(file),
        fix="the file is missing, damaged or was cut short: fetch or write it again",
    )


def tensor_names(file: Path) -> tuple[str, ...]:
    """The names in a safetensors file; reads its header only.

    Raises:
        WeightsError: missing, truncated or malformed.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            return tuple(reader.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def read_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Reads the named tensors alone.

    Raises:
        WeightsError: the file is damaged or lacks one of them.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def weight_shards(directory: Path) -> tuple[dict[str, str], bool]:
    """The table from tensor name to shard of a checkpoint, checked against the shards' headers.

    Returns:
        The table, and whether the checkpoint is one file without an index.

    Raises:
        WeightsError: no safetensors weights, or a shard is missing, cut short, or lacks a tensor.
    """
    if (directory / INDEX_FILE).exists():
        table = read_weight_map(directory)
        for shard in sorted(set(table.values())):
            if not (directory / shard).exists():
                raise WeightsError(
                    f"shard {shard} is missing",
                    where=str(directory),
                    fix="fetch the checkpoint again, complete",
                )
            present = set(tensor_names(directory / shard))
            lost = [name for name, at in table.items() if at == shard and name not in present]
            if lost:
                raise WeightsError(
                    f"the index places tensor {lost[0]} in {shard}, which lacks it",
                    where=str(directory / INDEX_FILE),
                    fix="fetch the checkpoint again, complete",
                )
        return table, False
    if (directory / SINGLE_FILE).exists():
        return dict.fromkeys(tensor_names(directory / SINGLE_FILE), SINGLE_FILE), True
    raise WeightsError(
        f"neither {INDEX_FILE} nor {SINGLE_FILE} is there",
        where=str(directory),
        fix="give a checkpoint in safetensors format",
    )


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """The header of an open safetensors file (checked before by `tensor_names`)."""
    (size,) = struct.unpack("<Q", stream.read(8))
    return cast(dict[str, Any], json.loads(stream.read(size)))


def rename_tensors(source: Path, target: Path, rename: Callable[[str], str | None]) -> int:
    """Writes a shard anew under other names; the tensors' bytes are copied block by block.

    Args:
        source: a safetensors file. target: to be written.
        rename: the new name, or None to leave the tensor out.

    Returns:
        The bytes written. Memory stays below 32 MiB plus the header.
    """
    tensor_names(source)
    with source.open("rb") as reader, target.open("wb") as writer:
        old = read_header(reader)
        data_start = reader.tell()
        new: dict[str, Any] = {}
        if "__metadata__" in old:
            new["__metadata__"] = old.pop("__metadata__")
        ranges: list[tuple[int, int]] = []
        offset = 0
        for name, entry in sorted(old.items(), key=lambda item: item[1]["data_offsets"]):
            renamed = rename(name)
            if renamed is None:
                continue
            begin, end = entry["data_offsets"]
            new[renamed] = {**entry, "data_offsets": [offset, offset + end - begin]}
            offset += end - begin
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        header = json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % _ALIGN)
        writer.write(struct.pack("<Q", len(header)) + header)
        for begin, end in ranges:
            reader.seek(data_start + begin)
            left = end - begin
            while left:
                block = reader.read(min(_BLOCK, left))
                if not block:
                    raise WeightsError(
                        "the file was cut short",
                        where=str(source),
                        fix="fetch the checkpoint again, complete",
                    )
                writer.write(block)
                left -= len(block)
        return 8 + len(header) + offset
