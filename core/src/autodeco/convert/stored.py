"""What an imported checkpoint holds and where: the records of its manifest, and its verification.

An imported checkpoint is a directory with ``weights/`` (torch.distributed.checkpoint's format, as
megatron-core reads it), ``hf/`` (config.json, tokenizer and the like, from the source) and
``import.json``, the manifest that marks it as ours. The ``.metadata``
in ``weights/`` is a pickle: nothing here reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from autodeco.errors import WeightsError
from autodeco.files import read_object
from autodeco.foreign import is_plain_name

MANIFEST = "import.json"
WEIGHTS = "weights"
HF_FILES = "hf"
VERSION = 2
Dims = tuple[int, ...]
_BLOCK = 16 << 20
_AGAIN = "remove the directory and import again"


@dataclass(frozen=True)
class Piece:
    """A block of rows of one target of the weight map, as megatron-core stores it.

    Attributes:
        target: The target's name.
        first_row: Of the block, in the target.
        shape: The block's, as in the target: [rows, ...].
        key: Name of the stored tensor, which stacks layers (and experts) in its first dimensions.
        aliases: Further names of the same stored tensor.
        global_shape: The stored tensor's.
        offset: Where the block begins in it.
    """

    target: str
    first_row: int
    shape: Dims
    key: str
    aliases: tuple[str, ...]
    global_shape: Dims
    offset: Dims

    @property
    def stored_shape(self) -> Dims:
        """Returns the block's shape with ones for the stacked dimensions."""
        return (1,) * (len(self.global_shape) - len(self.shape)) + self.shape

    @property
    def numel(self) -> int:
        """Returns the number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class WrittenPiece:
    """A piece on disk.

    Attributes:
        piece: What it is.
        dtype: As torch names it, without ``torch.``.
        file: Its file in ``weights/``.
        at: Where its record begins in the file.
        length: Bytes of the record.
        start: Where its elements begin in the file, in row-major order.
        size: Bytes of its elements.
        sha256: Of its elements.
    """

    piece: Piece
    dtype: str
    file: str
    at: int
    length: int
    start: int
    size: int
    sha256: str


@dataclass(frozen=True)
class WrittenFile:
    """A file on disk: its size in bytes and its CRC-32; the elements in it have hashes."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Part:
    """One file of pieces, written by one rank in one step.

    Attributes:
        file: Its name in ``weights/``.
        content: Its size and hash.
        pieces: In the order of the file.
        blob: Where the one empty object lies that all object keys share; None: not in this part.
    """

    file: str
    content: WrittenFile
    pieces: tuple[WrittenPiece, ...]
    blob: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns it for a JSON file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Part:
        """Reads what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: It did not write this.
        """
        pieces = tuple(_written(p) for p in value["pieces"])
        blob = _wholes(value["blob"]) if value["blob"] else None
        if blob is not None and len(blob) != 2:
            raise ValueError("a blob has a place and a length")
        return cls(_name(value["file"]), _file(value["content"]), pieces, blob)


def _written(value: Mapping[str, Any]) -> WrittenPiece:
    piece = value["piece"]
    return WrittenPiece(
        Piece(
            _text(piece["target"]),
            _whole(piece["first_row"]),
            _wholes(piece["shape"]),
            _text(piece["key"]),
            tuple(map(_text, piece["aliases"])),
            _wholes(piece["global_shape"]),
            _wholes(piece["offset"]),
        ),
        _text(value["dtype"]),
        _name(value["file"]),
        _whole(value["at"]),
        _whole(value["length"]),
        _whole(value["start"]),
        _whole(value["size"]),
        _text(value["sha256"]),
    )


def _file(value: Mapping[str, Any]) -> WrittenFile:
    return WrittenFile(_whole(value["size"]), _whole(value["crc32"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _name(value: object) -> str:
    if not is_plain_name(value):
        raise ValueError(f"{value!r} leads outside the directory, and is no name of a file")
    return str(value)


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _wholes(value: Sequence[object]) -> tuple[int, ...]:
    return tuple(map(_whole, value))


@dataclass(frozen=True)
class Manifest:
    """Everything about an imported checkpoint.

    Attributes:
        source: Digest of the checkpoint that it was made from.
        parts: Its files of tensors.
        files: The other files of ``weights/``.
    """

    source: str
    parts: tuple[Part, ...]
    files: Mapping[str, WrittenFile]

    def to_json(self) -> dict[str, Any]:
        """Returns it for a JSON file."""
        return {
            "made_by": "autodeco import",
            "format": "torch_dist",
            "version": VERSION,
            "source": self.source,
            "parts": [part.to_json() for part in self.parts],
            "files": {name: dataclasses.asdict(file) for name, file in self.files.items()},
        }

    def contents(self) -> dict[str, WrittenFile]:
        """Returns every file in ``weights/``, by name."""
        return {**{part.file: part.content for part in self.parts}, **self.files}


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of an imported checkpoint and checks that its files are there.

    Raises:
        WeightsError: There is none, it is of another version, or a file is missing or has another
            size.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise WeightsError(
            "the directory is no imported checkpoint: it has no " + MANIFEST,
            where=str(directory),
            fix="make one with autodeco import --format torch_dist --output DIR",
        )
    value = read_object(path)
    try:
        if (value["format"], value["version"]) != ("torch_dist", VERSION):
            raise ValueError(f"format {value['format']}, version {value['version']}")
        manifest = Manifest(
            _text(value["source"]),
            tuple(Part.from_json(part) for part in value["parts"]),
            {_name(name): _file(file) for name, file in value["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"the manifest cannot be used: {error}", where=str(path), fix=_AGAIN
        ) from error
    for name, content in manifest.contents().items():
        _check_size(directory / WEIGHTS / name, content)
    return manifest


def _check_size(path: Path, content: WrittenFile) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != content.size:
        found = "is missing" if size is None else f"has {size} bytes, written were {content.size}"
        raise WeightsError(f"the file {found}", where=str(path), fix=_AGAIN)


def verify(directory: Path, manifest: Manifest, *, rank: int = 0, ranks: int = 1) -> None:
    """Reads files back and compares their checksums; this rank takes every `ranks`-th file.

    Raises:
        WeightsError: A file is damaged; the message names the first tensor that is.
    """
    pieces = {part.file: part.pieces for part in manifest.parts}
    for name, content in sorted(manifest.contents().items())[rank::ranks]:
        path = directory / WEIGHTS / name
        if file_crc32(path) == content.crc32:
            continue
        with path.open("rb") as stream:
            broken = [
                w.piece.target
                for w in pieces.get(name, ())
                if span_sha256(stream, w.start, w.size) != w.sha256
            ]
        raise WeightsError(
            "the file is damaged" + (f": {broken[0]!r} has other bytes" if broken else ""),
            where=str(path),
            fix=_AGAIN,
        )


def file_crc32(path: Path) -> int:
    """Returns the CRC-32 of a whole file, read block by block."""
    value = 0
    with path.open("rb") as stream:
        for block in _blocks(stream, 0, path.stat().st_size):
            value = zlib.crc32(block, value)
    return value


def span_sha256(stream: BinaryIO, start: int, size: int) -> str:
    """Returns the sha256 of `size` bytes from `start`, read block by block."""
    digest = hashlib.sha256()
    for block in _blocks(stream, start, size):
        digest.update(block)
    return digest.hexdigest()


def _blocks(stream: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    stream.seek(start)
    while size > 0:
        block = stream.read(min(size, _BLOCK))
        if not block:
            return
        size -= len(block)
        yield block
