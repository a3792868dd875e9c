"""Reads targets, or slices of them, from an imported checkpoint; nothing is unpickled."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autodeco.convert.direct_reader import read_into
from autodeco.convert.stored import MANIFEST, WEIGHTS, WrittenPiece, read_manifest
from autodeco.errors import WeightsError

_FORGED = (OSError, EOFError, ValueError, TypeError, RuntimeError, IndexError, OverflowError)


class StoredReader:
    """An open imported checkpoint; use it in a ``with`` block.

    Args:
        directory: It has a manifest.

    Raises:
        WeightsError: It is none of ours, or not complete.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pieces: dict[str, list[WrittenPiece]] = {}
        for part in read_manifest(directory).parts:
            for written in part.pieces:
                if written.file != part.file or not _is_dtype(written.dtype):
                    raise self._forged(written, "names another file or dtype than its part")
                self._pieces.setdefault(written.piece.target, []).append(written)
        self._open: dict[str, mmap.mmap] = {}
        self._descriptors: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> StoredReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()  # the maps close with the last tensor on them
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def targets(self) -> frozenset[str]:
        """Returns the names of all targets that it holds."""
        return frozenset(self._pieces)

    def size(self) -> int:
        """Returns the bytes of all of them."""
        return sum(written.size for pieces in self._pieces.values() for written in pieces)

    def read(self, target: str, dim: int = 0, rank: int = 0, ranks: int = 1) -> Tensor:
        """Returns the slice number `rank` of `ranks` along `dim` of each of the target's pieces.

        Args:
            target: A name of the weight map.
            dim: 0 or 1.
            rank, ranks: Which slice; no other byte is read.

        Raises:
            WeightsError: The checkpoint does not hold the target.
        """
        pieces = sorted(self._pieces.get(target, ()), key=lambda w: w.piece.first_row)
        if not pieces:
            raise WeightsError(
                f"the imported checkpoint has no {target!r}",
                where=str(self.directory / MANIFEST),
                fix="remove the directory and import again",
            )
        try:
            if ranks == 1:
                return self._whole(pieces)
            parts = [self._slice(written, dim, rank, ranks) for written in pieces]
        except _FORGED as error:
            raise self._forged(pieces[0], f"cannot be read: {error}") from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _whole(self, pieces: Sequence[WrittenPiece]) -> Tensor:
        """Reads all rows of all pieces into one tensor; a map would fault in page by page."""
        raw = torch.empty(sum(written.size for written in pieces), dtype=torch.uint8)
        view, start = raw.numpy().data, 0
        for written in pieces:
            if written.dtype != pieces[0].dtype:
                raise ValueError(f"{written.dtype} beside {pieces[0].dtype}")
            stop = start + written.size
            read_into(self._descriptor(written.file), written.start, view[start:stop])
            start = stop
        rows = sum(written.piece.shape[0] for written in pieces)
        dtype = getattr(torch, pieces[0].dtype)
        return raw.view(dtype).view(rows, *pieces[0].piece.shape[1:])

    def _slice(self, written: WrittenPiece, dim: int, rank: int, ranks: int) -> Tensor:
        shape, dtype = list(written.piece.shape), getattr(torch, written.dtype)
        # As bytes: records begin anywhere in a file, and elements must be aligned.
        raw = torch.frombuffer(
            self._file(written.file), dtype=torch.uint8, count=written.size, offset=written.start
        ).view(shape[0], -1)
        size = raw.shape[dim] // ranks
        taken = raw.narrow(dim, rank * size, size).clone(memory_format=torch.contiguous_format)
        shape[dim] //= ranks
        return taken.view(dtype).view(shape)

    def _forged(self, written: WrittenPiece, problem: str) -> WeightsError:
        return WeightsError(
            f"the manifest's piece of {written.piece.target!r} {problem}",
            where=str(self.directory / MANIFEST),
            fix="remove the directory and import again",
        )

    def _descriptor(self, name: str) -> int:
        with self._opening:
            if name not in self._descriptors:
                flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
                self._descriptors[name] = os.open(self.directory / WEIGHTS / name, flags)
            return self._descriptors[name]

    def _file(self, name: str) -> mmap.mmap:
        if name not in self._open:
            with (self.directory / WEIGHTS / name).open("rb") as stream:
                # a private map: torch wants to be allowed to write
                self._open[name] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._open[name]


def _is_dtype(name: object) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)
