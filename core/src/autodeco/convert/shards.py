"""Reads tensors, or slices of them, from the shards of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from autodeco.convert.safetensors_header import TensorInfo, read_checkpoint


class ShardReader:
    """Open shards of a checkpoint; use it in a ``with`` block.

    What it returns lies in the page cache until it is copied: only the bytes of a slice are read.

    Args:
        path: The checkpoint directory.

    Raises:
        WeightsError: A shard is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        self.infos: Mapping[str, TensorInfo] = read_checkpoint(path)
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, name: str, dim: int = 0, rank: int = 0, ranks: int = 1) -> Tensor:
        """Returns the slice number `rank` of `ranks` along `dim`; no other byte is read."""
        info = self.infos[name]
        if info.file not in self._open:
            self._open[info.file] = safe_open(info.file, framework="pt")
        piece = self._open[info.file].get_slice(name)
        size = info.shape[dim] // ranks
        start = rank * size
        taken: Tensor = piece[:, start : start + size] if dim else piece[start : start + size]
        return taken
