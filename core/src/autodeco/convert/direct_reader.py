"""Reads a checkpoint for a conversion: with reads instead of maps, rounded as it is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from autodeco.convert.operations import Region
from autodeco.convert.shards import ShardReader, StoredTensor, named_function
from autodeco.errors import WeightsError
from autodeco.safetensors_header import DTYPE_BYTES, TensorInfo
from autodeco.storage import StorageFormat

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class DirectReader(ShardReader):
    """Open shards of a checkpoint whose tensors come in the dtype that they are written in.

    Nothing is mapped, so that what is read is held by nobody but the caller, and a disk that fails
    is an error, not the end of the process. Threads may share a reader.

    Args:
        path: The checkpoint directory.
        formats: The plugin's own storage formats.
        device: Where tensors that are stored in parts are decoded.
        plainly: Decode in float32 and round, though there may be a faster way: for verification.

    Raises:
        WeightsError: A shard is missing or broken, or a part of a tensor is missing.
    """

    def __init__(
        self,
        path: Path,
        formats: Sequence[StorageFormat] = (),
        *,
        device: str = "cpu",
        plainly: bool = False,
    ) -> None:
        super().__init__(path, formats)
        self._device, self._plainly = device, plainly
        self._descriptors: dict[Path, int] = {}

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Returns a block of a tensor, of its `StoredTensor.dtype`, on the CPU; see `ShardReader`.

        Raises:
            WeightsError: The file cannot be read, or is shorter than it was.
        """
        tensor = super().read(name, region)
        return tensor.to(TORCH_DTYPES[self.tensors[name].dtype]).cpu()

    def read_bytes(self, name: str, start: int, size: int) -> Tensor:
        """Returns bytes of a tensor that is stored as it is, uint8 [size], from its byte `start`.

        Raises:
            WeightsError: The file cannot be read, or is shorter than it was.
        """
        return self._bytes(name, self.tensors[name].parts[""], start, size)

    def _decode(self, tensor: StoredTensor, how: StorageFormat, parts: dict[str, Tensor]) -> Tensor:
        if self._device == "cpu" and how.decode_bfloat16 and not self._plainly:
            decoded: Tensor = named_function(how.decode_bfloat16, how.name)(parts)
            return decoded
        there = {name: part.to(self._device) for name, part in parts.items()}
        return super()._decode(tensor, how, there)

    def _read(self, stored: str, info: TensorInfo, region: Region) -> Tensor:
        """Reads the rows that hold the block, in one go, and cuts the block out of them."""
        outer = next((d for d, (a, b) in enumerate(region) if b - a != 1), len(region))
        strides = [prod(info.shape[d + 1 :]) for d in range(len(region))]
        first = sum(a * s for (a, _), s in zip(region[: outer + 1], strides, strict=False))
        rows = [b - a for a, b in region[: outer + 1]]
        shape = (*rows, *info.shape[outer + 1 :])
        itemsize = DTYPE_BYTES[info.dtype]
        raw = self._bytes(stored, info, first * itemsize, prod(shape) * itemsize)
        block = raw.view(TORCH_DTYPES[info.dtype]).view(shape)
        inner = tuple(slice(a, b) for a, b in region[outer + 1 :])
        return block[(slice(None),) * (outer + 1) + inner] if inner else block

    def _bytes(self, stored: str, info: TensorInfo, start: int, size: int) -> Tensor:
        result = torch.empty(size, dtype=torch.uint8)
        try:
            read_into(self._descriptor(info.file), info.start + start, result.numpy().data)
        except OSError as error:
            raise WeightsError(
                f"cannot read tensor {stored!r}: {error.strerror or error}",
                where=str(info.file),
                fix="check the disk, then run the same command again",
            ) from error
        except EOFError as error:
            raise WeightsError(
                f"the file ends within tensor {stored!r}",
                where=str(info.file),
                fix="it was changed or cut short meanwhile: fetch it again",
            ) from error
        return result

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._descriptors[file]


def read_into(descriptor: int, position: int, view: memoryview) -> None:
    """Fills `view` with a file's bytes from `position`.

    Raises:
        OSError: They cannot be read.
        EOFError: There are not so many.
    """
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise EOFError
        view, position = view[count:], position + count
