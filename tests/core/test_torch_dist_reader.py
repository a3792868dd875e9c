"""Tensors of a torch.distributed.checkpoint directory, read by their bytes alone."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_dist_made import forge, grid, write

from autodeco.convert import torch_dist_reader
from autodeco.convert.torch_dist_reader import TorchDistReader
from autodeco.errors import WeightsError

DRAWN = torch.Generator().manual_seed(3)
TENSORS = {
    "cube": torch.randn(3, 8, 10, generator=DRAWN),
    "matrix": torch.randn(40, 12, generator=DRAWN).bfloat16(),
    "half": torch.randn(7, generator=DRAWN).half(),
    "counts": torch.arange(12).reshape(3, 4),
    "small": torch.arange(6, dtype=torch.uint8).reshape(1, 1, 6),
    "flags": torch.tensor([True, False, True]),
    "eighth": torch.randn(16, 4, generator=DRAWN).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
}
CHUNKS = {
    "cube": grid(TENSORS["cube"], [1, 2], [3], [5, 9]),
    "matrix": grid(TENSORS["matrix"], [10, 20, 30], []),
    "counts": grid(TENSORS["counts"], [], [1]),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("stored")
    write(directory, TENSORS, chunks=CHUNKS, file_of=lambda key, at: sum(at) % 3)
    return directory


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


@pytest.mark.parametrize("key", TENSORS)
def test_whole_tensors_are_what_torch_reads(stored: Path, key: str) -> None:
    state = {key: torch.empty_like(TENSORS[key])}
    dcp.load(state, storage_reader=dcp.FileSystemReader(stored), no_dist=True)
    with TorchDistReader(stored) as reader:
        assert same(reader.read(key), state[key])
    assert same(state[key], TENSORS[key])


@given(st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("block", [8 << 20, 24])
def test_any_block_is_the_slice(stored: Path, block: int, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(TENSORS)))
    tensor = TENSORS[key]
    region = tuple(
        tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))))
        for n in tensor.shape
    )
    with pytest.MonkeyPatch.context() as patch, TorchDistReader(stored) as reader:
        patch.setattr(torch_dist_reader, "_BLOCK", block)
        found = reader.read(key, region)  # type: ignore[arg-type]
    assert same(found, tensor[tuple(slice(a, b) for a, b in region)])


def test_a_block_outside_is_refused(stored: Path) -> None:
    with TorchDistReader(stored) as reader:
        for region in (((0, 41), (0, 12)), ((-1, 4), (0, 12)), ((3, 2), (0, 1)), ((0, 1),)):
            with pytest.raises(WeightsError, match="has no block"):
                reader.read("matrix", region)


class Counted:
    """Bytes that are read from files, by name."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: dict[str, int] = {}
        for name in ("pread", "preadv"):
            patch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counting(descriptor: int, what: Any, position: int) -> Any:
            result = plain(descriptor, what, position)
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            size = result if isinstance(result, int) else len(result)
            self.read[name] = self.read.get(name, 0) + size
            return result

        return counting


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.zeros(4, 1 << 18)
    chunks = {"large": grid(large, [1, 2, 3], [])}
    write(tmp_path, {"large": large, "x": torch.ones(4)}, chunks=chunks)
    with TorchDistReader(tmp_path) as reader:
        counted = Counted(monkeypatch)
        reader.read("x")
        assert counted.read["__0_0.distcp"] < 4000
        reader.read("large", ((1, 2), (100, 356)))
        assert counted.read["__0_0.distcp"] < 4000 + 3000 + 1024


def damaged(stored: Path, place: Path, edit: Callable[[Path], None]) -> TorchDistReader:
    copy = place / "copy"
    shutil.copytree(stored, copy)
    edit(copy)
    return TorchDistReader(copy)


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / name
        os.truncate(path, int(path.stat().st_size * keep))

    return edit


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 0.9])
def test_a_record_that_is_cut_short_is_named(stored: Path, tmp_path: Path, keep: float) -> None:
    problems = 0
    with damaged(stored, tmp_path, cut("__0_0.distcp", keep)) as reader:
        for key in TENSORS:
            try:
                assert same(reader.read(key), TENSORS[key])
            except WeightsError as error:
                problems += 1
                assert str(error.where).endswith("__0_0.distcp")
                assert key in error.what
    assert problems >= 1


def test_a_missing_file_is_named(stored: Path, tmp_path: Path) -> None:
    def remove(directory: Path) -> None:
        (directory / "__1_0.distcp").unlink()

    with damaged(stored, tmp_path, remove) as reader:
        assert same(reader.read("half"), TENSORS["half"])
        with pytest.raises(WeightsError, match="missing") as error:
            reader.read("cube")
    assert str(error.value.where).endswith("__1_0.distcp")


def record(tensor: Any, **files: bytes) -> bytes:
    """A record of torch.save; `files` replaces or adds members."""
    stream = io.BytesIO()
    torch.save(tensor, stream)
    if not files:
        return stream.getvalue()
    result = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(result, "w") as new:
        names = [e.filename for e in old.infolist()]
        for name in [*names, *(n for n in map(_member, files) if n not in names)]:
            inner = name.partition("/")[2]
            content = {_member(k).partition("/")[2]: v for k, v in files.items()}
            new.writestr(name, content.get(inner, old.read(name)))
    return result.getvalue()


def _member(name: str) -> str:
    return "archive/" + name.replace("__", "/").replace("_dot_", ".")


VALUE = torch.arange(8.0)
CASES: dict[str, tuple[bytes, str]] = {
    "another dtype": (record(VALUE.half()), "dtype"),
    "another shape": (record(torch.arange(9.0)), "shape"),
    "a view of more": (record(torch.arange(16.0)[::2]), "one after the other|bytes"),
    "an object": (record({"a": VALUE}), "no plain tensor"),
    "a sparse tensor": (record(torch.eye(8).to_sparse()), "one tensor"),
    "two tensors": (record([VALUE, torch.ones(2)]), "one tensor"),
    "other bytes": (record(VALUE, data__0=bytes(28)), "28 bytes"),
    "big endian": (record(VALUE, byteorder=b"big"), "order"),
    "a call": (record(VALUE, data_dot_pkl=b"cposix\nsystem\n."), "posix.system"),
    "a long description": (record(VALUE, data_dot_pkl=bytes(70000)), "too long"),
    "no description": (record(VALUE).replace(b"data.pkl", b"data.xyz"), "damaged"),
    "no archive": (bytes(2000), "damaged"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_record_that_is_not_what_the_metadata_says_is_refused(tmp_path: Path, name: str) -> None:
    content, message = CASES[name]
    write(tmp_path, {"x": VALUE})
    (tmp_path / "__0_0.distcp").write_bytes(content)
    for metadata in forge(tmp_path):
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(content)
    with TorchDistReader(tmp_path) as reader, pytest.raises(WeightsError, match=message):
        reader.read("x")


@pytest.mark.parametrize("changes", [{"offset": 10}, {"length": 100}, {"length": 1 << 40}])
def test_a_record_at_another_place_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    write(tmp_path, {"x": VALUE})
    for metadata in forge(tmp_path):
        for info in metadata.storage_data.values():
            vars(info).update(changes)
    with TorchDistReader(tmp_path) as reader, pytest.raises(WeightsError):
        reader.read("x")


def test_a_forged_size_asks_for_no_memory(tmp_path: Path) -> None:
    """The tensor is huge, and so is its one chunk, by the metadata; its record is not."""
    write(tmp_path, {"x": VALUE})
    for metadata in forge(tmp_path):
        entry = metadata.state_dict_metadata["x"]
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 50])
    with TorchDistReader(tmp_path) as reader, pytest.raises(WeightsError, match="shape"):
        reader.read("x")


def test_parameters_are_tensors(tmp_path: Path) -> None:
    content = record(torch.nn.Parameter(VALUE))
    write(tmp_path, {"x": VALUE})
    (tmp_path / "__0_0.distcp").write_bytes(content)
    for metadata in forge(tmp_path):
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(content)
    with TorchDistReader(tmp_path) as reader:
        assert same(reader.read("x"), VALUE)
