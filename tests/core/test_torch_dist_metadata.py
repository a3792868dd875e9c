"""`.metadata` is read as data: what torch writes is understood, what is forged is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch_dist_made import forge, grid, write

from autodeco.convert import inert_pickle
from autodeco.convert.inert_pickle import Inert, Pairs, read_pickle
from autodeco.convert.torch_dist_metadata import ITEM_BYTES, TorchDistMetadata
from autodeco.errors import WeightsError

MATRIX = torch.arange(24.0).reshape(4, 6).bfloat16()
CUT = {"m": grid(MATRIX, [2], [3])}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A matrix in four chunks in two files, a scalar, and an object."""
    write(
        tmp_path,
        {"m": MATRIX, "s": torch.tensor(3.0)},
        chunks=CUT,
        file_of=lambda key, offset: int(offset == (2, 3)),
        objects=["extra/shard_0_1"],
    )
    return tmp_path


def change(directory: Path, edit: Callable[[Any], None]) -> Path:
    for metadata in forge(directory):
        edit(metadata)
    return directory


def test_what_torch_writes_becomes_plain_records(stored: Path) -> None:
    metadata = TorchDistMetadata(stored)
    assert set(metadata) == {"m", "s"}
    assert metadata.objects == {"extra/shard_0_1"}
    info = metadata.tensor("m")
    assert (info.dtype, info.shape, info.itemsize) == ("bfloat16", (4, 6), 2)
    assert {(c.offset, c.shape) for c in info.chunks} == set(CUT["m"])
    files = {c.offset: c.file for c in info.chunks}
    assert files[2, 3] == "__1_0.distcp" != files[0, 0] == "__0_0.distcp"
    assert metadata.tensor("s").shape == ()
    with pytest.raises(WeightsError, match="no tensor 'x'"):
        metadata.tensor("x")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_says_the_same(stored: Path, protocol: int) -> None:
    before = TorchDistMetadata(stored).tensor("m")
    path = stored / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
    assert TorchDistMetadata(stored).tensor("m") == before


def test_what_megatron_core_and_paths_add_is_taken(stored: Path) -> None:
    def add(metadata: Any) -> None:
        metadata.storage_meta = StorageMeta(checkpoint_id=Path("/somewhere"), modules=["a"])
        metadata.mcore_data = {"m": {"nd_reformulated_orig_global_shape": (4, 6)}}
        metadata.planner_data = {"m": ("m",)}
        metadata.all_local_plans = [pickle.loads(pickle.dumps(TensorProperties(torch.float8_e5m2)))]

    assert set(TorchDistMetadata(change(stored, add))) == {"m", "s"}


def test_megatron_cores_own_kinds_are_taken(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the versions that NeMo 2 has, as a pickle names them."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = types.ModuleType(name)
    kinds: Any = [type(k, (), {"__module__": name}) for k in ("MCoreMetadata", "MCoreSavePlan")]
    for kind in kinds:
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, name, module)
    before, path = TorchDistMetadata(stored).tensor("m"), stored / ".metadata"
    root, plan = kinds[0](), kinds[1]()
    vars(root).update(vars(pickle.loads(path.read_bytes())), mcore_data={"m": {}})
    vars(root).update(all_local_plans=[plan])
    path.write_bytes(pickle.dumps(root))
    assert TorchDistMetadata(stored).tensor("m") == before
    path.write_bytes(pickle.dumps(plan))
    with pytest.raises(WeightsError, match="Metadata is expected"):
        TorchDistMetadata(stored)


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_the_sizes_of_elements_are_torchs(name: str) -> None:
    assert torch.empty(1, dtype=getattr(torch, name)).element_size() == ITEM_BYTES[name]


class _Calls:
    """A pickle of it calls `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.made = function, args

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (open, ("{}", "w"), "io.open"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (subprocess.Popen, (["touch", "{}"],), "subprocess.Popen"),
        (Path.touch, (Path("{}"),), "pathlib.Path.touch"),
        (__import__, ("this",), "builtins.__import__"),
    ],
)
def test_another_name_is_refused_and_named(
    stored: Path, function: Any, args: tuple[Any, ...], name: str
) -> None:
    made = stored / "made"
    filled = tuple(a.format(made) if isinstance(a, str) else a for a in args)
    for attribute in ("planner_data", "storage_data", "state_dict_metadata"):
        forged = stored / attribute
        write(forged, {"m": MATRIX})
        change(forged, lambda m, at=attribute: setattr(m, at, {"m": _Calls(function, *filled)}))  # type: ignore[misc]
        with pytest.raises(WeightsError, match=name.split(".")[-1]) as error:
            TorchDistMetadata(forged)
        assert "not on the list" in str(error.value)
    assert not made.exists()


def test_getattr_on_a_listed_name_is_not_called(stored: Path) -> None:
    way_out = _Calls(getattr, torch.Size, "__subclasses__")
    change(stored, lambda m: setattr(m, "planner_data", _Calls(getattr, way_out, "x")))
    assert set(TorchDistMetadata(stored)) == {"m", "s"}  # the second is no name: nothing is made


def test_it_goes_deep_without_recursion() -> None:
    deep = b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b"."
    value = read_pickle(deep, (), "here")
    assert type(value) is list
    tuples = b"\x80\x04)" + b"\x85" * 300_000 + b"."
    assert type(read_pickle(tuples, (), "here")) is tuple
    keys = b"\x80\x04})" + b"\x85" * 300_000 + b"Ns."  # hashing this one would end the process
    assert type(read_pickle(keys, (), "here")) is Pairs


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04r\xff\xff\xff\xff.",  # nothing there to remember
        b"\x80\x04Nj\xff\xff\xff\xff.",  # never remembered
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2**63 elements
        b"\x80\x04X\xff\xff\xff\x7fabc.",  # a text of 2 GiB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04\x8a\xff1.",
        b"\x80\x04]Na",  # cut short
        b"\x80\x04a.",
        b"\x80\x04(.",
        b"\x80\x04(((t.",
        b"\x80\x04NN.",
        b"\x80\x04NNR.",
        b"\x80\x04]Nb.",
        b"\x80\x04\x82\x01.",  # an extension by number
        b"c__main__\nX\n.",
        b"(ios\nsystem\n.",
        b"",
    ],
)
def test_broken_and_outlandish_pickles_are_refused(data: bytes) -> None:
    start = time.monotonic()
    with pytest.raises(WeightsError) as error:
        read_pickle(data, ("torch.Size",), "the file")
    assert error.value.where == "the file"
    assert error.value.fix
    assert time.monotonic() - start < 1


def test_a_remembered_place_costs_nothing_however_high() -> None:
    assert read_pickle(b"\x80\x04Nr\xff\xff\xff\xff.", (), "here") is None


def test_it_is_limited_in_size_and_steps(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert_pickle, "_MOST_STEPS", 10)
    with pytest.raises(WeightsError, match="more than 10 instructions"):
        TorchDistMetadata(stored)
    monkeypatch.setattr(inert_pickle, "MOST_BYTES", 100)
    with pytest.raises(WeightsError, match="100 are read"):
        TorchDistMetadata(stored)


@given(st.binary(max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_data_or_an_error(data: bytes) -> None:
    for pickled in (data, data + b".", b"\x80\x04" + data):
        try:
            value = read_pickle(pickled, ("torch.Size",), "here")
        except WeightsError:
            continue
        assert value is None or isinstance(value, bool | int | float | str | list | tuple | Inert) \
            or type(value).__name__ == "Global"  # fmt: skip


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: Any, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp() / "damaged"
    if not directory.exists():
        write(directory, {"m": MATRIX}, chunks=CUT, objects=["o"])
        (directory / "whole").write_bytes((directory / ".metadata").read_bytes())
    content = bytearray((directory / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    (directory / ".metadata").write_bytes(content[:cut])
    try:
        metadata = TorchDistMetadata(directory)
        for key in metadata:
            metadata.tensor(key)
    except WeightsError:
        pass


def chunk(offset: tuple[int, ...], shape: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))


def _second(metadata: Any, new: ChunkStorageMetadata) -> None:
    """Puts `new` in the place of the second chunk of m, its record as well."""
    entry = metadata.state_dict_metadata["m"]
    old = MetadataIndex("m", entry.chunks[1].offsets)
    metadata.storage_data[MetadataIndex("m", new.offsets)] = metadata.storage_data[old]
    entry.chunks[1] = new


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (chunk((0, 2), (2, 3)), "overlap"),
        (chunk((0, 3), (2, 4)), "beyond"),
        (chunk((0, 3), (1, 3)), "cover 21 of 24"),
        (chunk((0, 3), (3, 3)), "overlap"),
        (chunk((0,), (2,)), "dimensions"),
        (chunk((0, 3, 0), (2, 3, 1)), "dimensions"),
    ],
)
def test_chunks_must_make_up_the_tensor(
    stored: Path, new: ChunkStorageMetadata, message: str
) -> None:
    metadata = TorchDistMetadata(change(stored, lambda m: _second(m, new)))
    with pytest.raises(WeightsError, match=message):
        metadata.tensor("m")
    assert metadata.tensor("s").shape == ()  # the other one can be read


def test_uneven_chunks_are_compared_too(tmp_path: Path) -> None:
    """A pinwheel: no cut goes through the whole square."""
    square = torch.arange(9.0).reshape(3, 3)
    wheel = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    write(tmp_path, {"m": square}, chunks={"m": wheel})
    assert len(TorchDistMetadata(tmp_path).tensor("m").chunks) == 5


def _edit_info(**changes: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            vars(info).update(changes)

    return edit


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\b", "c:x", "a\nb", "n" * 300, 3, None]
)
def test_no_path_leaves_the_directory(stored: Path, name: Any) -> None:
    with pytest.raises(WeightsError, match="outside the directory"):
        TorchDistMetadata(change(stored, _edit_info(relative_path=name)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit_info(offset=-1), "no place"),
        (_edit_info(length=1 << 70), "no place"),
        (_edit_info(length=True), "no place"),
        (_edit_info(transform_descriptors=["zstd"]), "compressed"),
        (lambda m: setattr(m, "storage_data", None), "table is missing"),
        (lambda m: setattr(m, "state_dict_metadata", {"m": 3}), "TensorStorageMetadata"),
        (lambda m: setattr(m, "storage_data", {"m": 3}), "MetadataIndex"),
        (lambda m: setattr(m, "state_dict_metadata", {3: BytesStorageMetadata()}), "no text"),
    ],
)
def test_other_forgeries_are_refused(
    stored: Path, edit: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        TorchDistMetadata(change(stored, edit))


@pytest.mark.parametrize("size", [(-1, 6), (1 << 63, 6), (1,) * 20, ("a", 6), 5, (4.0, 6.0)])
def test_absurd_shapes_are_refused(stored: Path, size: Any) -> None:
    def edit(metadata: Any) -> None:
        metadata.state_dict_metadata["m"].size = size

    with pytest.raises(WeightsError):
        TorchDistMetadata(change(stored, edit)).tensor("m")


def test_one_list_of_chunks_cannot_stand_for_many_tensors(stored: Path) -> None:
    def edit(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["m"]
        entry.chunks.extend([entry.chunks[0]] * 1000)
        for n in range(1000):
            metadata.state_dict_metadata[f"m{n}"] = entry

    metadata = TorchDistMetadata(change(stored, edit))
    with pytest.raises(WeightsError, match="more of them than are stored"):
        metadata.tensor("m7")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no \.metadata"):
        TorchDistMetadata(tmp_path)
