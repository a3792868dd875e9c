"""Where the targets of a weight map lie in a torch.distributed.checkpoint directory.

A directory with our manifest says so itself. In another one, NeMo's or megatron-core's, the keys
are those that megatron-core's own model has (`stored_layout`), with the differences between
versions that `_forms` lists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from autodeco.convert.operations import Region
from autodeco.convert.stored import MANIFEST, WEIGHTS, Dims, Piece, read_manifest
from autodeco.convert.stored_reader import StoredReader
from autodeco.convert.torch_dist_metadata import METADATA, TorchDistMetadata
from autodeco.convert.torch_dist_reader import TorchDistReader
from autodeco.errors import WeightsError
from autodeco.weights import BoundWeightMap

#: A stored tensor's key, and the block of it.
Place = tuple[str, Region]
_PREFIX = "module."
_STACKED, _LAYER = "decoder.layers.", re.compile(r"decoder\.layers\.(\d+)\.")
_BY_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# what a checkpoint of a training holds beside the model
_BESIDE = re.compile(
    r".*_extra_state(/.*)?|(.*\.)?(adapter|temp_head|top_p_head)\..*|"
    r"(.*\.)?(optimizer|chained_\d+|exp_avg|exp_avg_sq|fp32_param)\..*|"
    r"(rng_state|rerun_state_machine_state|opt_param_scheduler|args|iteration)(\W.*)?"
)
_EXTRA_LAYERS = re.compile(r"(module\.)*mtp\..*")
_EXTRA_REASON = "layers for multi-token prediction, which decoding does not use"


class Backbone(Protocol):
    """A stored model, open; use it in a ``with`` block. Threads may share it."""

    left_out: Mapping[str, str]

    def __enter__(self) -> Backbone:
        """Returns itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Closes its files."""
        ...

    def dtype(self, target: str) -> torch.dtype:
        """Returns the dtype that a target is stored in."""
        ...

    def read(self, target: str) -> Tensor:
        """Returns a whole target."""
        ...

    def digest(self) -> str:
        """Returns what changes when the checkpoint does."""
        ...


class ImportedBackbone:
    """A checkpoint that ``autodeco import`` has written.

    Args:
        directory: It has a manifest.
        bound: The weight map of its model.

    Raises:
        WeightsError: It is incomplete, or of another model.
    """

    def __init__(self, directory: Path, bound: BoundWeightMap) -> None:
        self._directory = directory
        manifest = read_manifest(directory)
        written = [w for part in manifest.parts for w in part.pieces]
        self._dtypes = _one_dtype(((w.piece.target, w.dtype) for w in written), directory)
        rows: dict[str, list[Piece]] = {}
        for one in written:
            rows.setdefault(one.piece.target, []).append(one.piece)
        _check_targets(bound, rows, directory / MANIFEST)
        self._reader = StoredReader(directory)
        self.left_out: Mapping[str, str] = {}

    def __enter__(self) -> ImportedBackbone:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def dtype(self, target: str) -> torch.dtype:
        """Returns the dtype that a target is stored in."""
        return self._dtypes[target]

    def read(self, target: str) -> Tensor:
        """Returns a whole target.

        Raises:
            WeightsError: A file is damaged.
        """
        return self._reader.read(target)

    def digest(self) -> str:
        """Returns what changes when the checkpoint does."""
        return hashlib.sha256((self._directory / MANIFEST).read_bytes()).hexdigest()[:16]


class KeyedBackbone:
    """A checkpoint of NeMo 2 or megatron-core.

    Args:
        weights: The directory with ``.metadata``.
        bound: The weight map of its model.
        pieces: Of the same model, with megatron-core's keys.

    Raises:
        WeightsError: A tensor is missing, of another shape, or belongs to no target.
    """

    def __init__(self, weights: Path, bound: BoundWeightMap, pieces: Sequence[Piece]) -> None:
        self._weights = weights
        self._reader = TorchDistReader(weights)
        metadata = self._reader.metadata
        rows: dict[str, list[Piece]] = {}
        self._places: dict[str, list[tuple[Piece, list[Place]]]] = {}
        for piece in sorted(pieces, key=lambda p: (p.target, p.first_row)):
            rows.setdefault(piece.target, []).append(piece)
            first, *others = _find(piece, metadata, bound)
            chunks = self._reader.info(first[0]).chunks  # an import has a record under two names
            twins = [place for place in others if self._reader.info(place[0]).chunks != chunks]
            self._places.setdefault(piece.target, []).append((piece, [first, *twins]))
        _check_targets(bound, rows, weights)
        named = {key for p in pieces for keys, _, _ in _forms(p, bound) for key in keys}
        self.left_out: Mapping[str, str] = _left_over(metadata, named, weights)
        kinds = (
            (target, self._reader.info(key).dtype)
            for target, places in self._places.items()
            for _, ((key, _), *_) in places
        )
        self._dtypes = _one_dtype(kinds, weights)

    def __enter__(self) -> KeyedBackbone:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def dtype(self, target: str) -> torch.dtype:
        """Returns the dtype that a target is stored in."""
        return self._dtypes[target]

    def read(self, target: str) -> Tensor:
        """Returns a whole target.

        Raises:
            WeightsError: A record is cut short, damaged, or not what the metadata says; or the
                target is stored under two names, differently.
        """
        parts = []
        for piece, ((key, region), *twins) in self._places[target]:
            tensor = self._reader.read(key, region)
            for other, block in twins:
                self._check_equal(tensor, key, other, block)
            parts.append(tensor.view(piece.shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_equal(self, tensor: Tensor, key: str, other: str, block: Region) -> None:
        second = self._reader.read(other, block).view(tensor.shape)
        if second.dtype != tensor.dtype or not torch.equal(*(_bits(t) for t in (tensor, second))):
            raise WeightsError(
                f"{other!r} is stored beside {key!r} and differs from it",
                where=str(self._weights),
                fix="they are one tensor in this model: set tie_word_embeddings to false in "
                "--model's config.json if the model has an output layer of its own",
            )

    def digest(self) -> str:
        """Returns what changes when the checkpoint does."""
        digest = hashlib.sha256((self._weights / METADATA).read_bytes())
        keys = {k for places in self._places.values() for _, mine in places for k, _ in mine}
        files = {chunk.file for key in keys for chunk in self._reader.info(key).chunks}
        for name in sorted(files):
            path = self._weights / name
            state = path.stat() if path.exists() else None
            size, time = (state.st_size, state.st_mtime_ns) if state else (0, 0)
            digest.update(f"{name} {size} {time}\n".encode())
        return digest.hexdigest()[:16]


def _forms(piece: Piece, bound: BoundWeightMap) -> Iterator[tuple[tuple[str, ...], Dims, Dims]]:
    """Yields under which keys a piece may be stored, with the tensor's shape and its offset there.

    Layers that are alike are stacked in the first dimension; models whose layers differ, and newer
    versions of megatron-core, store each layer by itself.
    """
    keys, shape, offset = (piece.key, *piece.aliases), piece.global_shape, piece.offset
    yield _both(keys), shape, offset
    match = _LAYER.search(piece.key)
    if match is not None:
        stacked = tuple(_LAYER.sub(_STACKED, key, count=1) for key in keys)
        layers = (bound.shape.num_layers, *shape)
        yield _both(stacked), layers, (int(match[1]), *offset)
    elif _STACKED in piece.key and len(shape) > len(piece.shape):
        apart = tuple(k.replace(_STACKED, f"{_STACKED}{offset[0]}.", 1) for k in keys)
        yield _both(apart), shape[1:], offset[1:]


def _both(keys: Iterable[str]) -> tuple[str, ...]:
    """With the prefix of a wrapped model, and without."""
    return tuple(name for key in keys for name in (key, key.removeprefix(_PREFIX)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _find(piece: Piece, metadata: TorchDistMetadata, bound: BoundWeightMap) -> list[Place]:
    """Returns a piece's key and block; several where it is stored under several names."""
    found: list[Place] = []
    others: list[str] = []
    for keys, shape, offset in _forms(piece, bound):
        sizes = (1,) * (len(shape) - len(piece.shape)) + piece.shape
        for key in (k for k in keys if k in metadata):
            stored = metadata.shape(key)
            if _fits(piece.target, stored, shape):
                region = tuple((o, o + n) for o, n in zip(offset, sizes, strict=True))
                found.append((key, region))
                continue
            others.append(f"{key!r} has the shape {stored}, expected {shape}")
    if found and not others:
        return found
    raise WeightsError(
        others[0] if others else f"there is no {piece.key!r}",
        where=str(metadata.path),
        fix="the checkpoint is incomplete or of another model: check --plugin, --preset and "
        "--model",
    )


def _fits(target: str, stored: Dims, shape: Dims) -> bool:
    """Whether a stored tensor has a shape; a vocabulary may be padded, to divide it by ranks."""
    if target in _BY_VOCABULARY:
        return len(stored) == len(shape) and stored[0] >= shape[0] and stored[1:] == shape[1:]
    return stored == shape


def _check_targets(
    bound: BoundWeightMap, pieces: Mapping[str, Sequence[Piece]], where: Path
) -> None:
    """Checks that the weight map's targets are there, no others, and each of them whole."""
    wanted = {rule.target: rule for rule in bound.rules}
    odd = sorted(wanted.keys() ^ pieces.keys())
    rows = {t: sum(part.size[0] for part in rule.parts) for t, rule in wanted.items()}
    odd += [t for t in wanted if t in pieces and sum(p.shape[0] for p in pieces[t]) != rows[t]]
    if odd:
        raise WeightsError(
            f"weight map and checkpoint do not agree on {odd[0]!r} ({len(odd)} such tensors)",
            where=str(where),
            fix="the checkpoint is of another model: check --plugin, --preset and --model",
        )


def _one_dtype(kinds: Iterable[tuple[str, str]], where: Path) -> dict[str, torch.dtype]:
    found: dict[str, str] = {}
    for target, dtype in kinds:
        if found.setdefault(target, dtype) != dtype:
            raise WeightsError(
                f"{target!r} is stored partly as {found[target]}, partly as {dtype}",
                where=str(where),
                fix="give a checkpoint that was written in one go",
            )
    return {target: getattr(torch, dtype) for target, dtype in found.items()}


def _left_over(metadata: TorchDistMetadata, used: set[str], weights: Path) -> dict[str, str]:
    """Returns tensors of the model that are left out -> why.

    Raises:
        WeightsError: There is one that nobody knows.
    """
    spare = sorted(key for key in metadata if key not in used and not _BESIDE.fullmatch(key))
    unknown = [key for key in spare if not _EXTRA_LAYERS.fullmatch(key)]
    if unknown:
        raise WeightsError(
            f"{len(unknown)} tensors belong to nothing in the weight map, the first is "
            f"{unknown[0]!r}",
            where=str(weights),
            fix="the checkpoint is of another model: check --plugin, --preset and --model",
        )
    return dict.fromkeys(spare, _EXTRA_REASON)


def imported_directory(path: Path) -> Path | None:
    """Returns the imported checkpoint that `path` is, or is the ``weights`` of; None: of none."""
    folders = (path, path.parent) if path.name == WEIGHTS else (path,)
    return next((d for d in folders if (d / MANIFEST).is_file()), None)
