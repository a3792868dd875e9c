"""Headers and indexes that somebody else wrote: what is accepted, safetensors reads alike."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autodeco.errors import WeightsError
from autodeco.foreign import is_plain_name, strict_json
from autodeco.safetensors_header import DTYPE_BYTES, INDEX, read_checkpoint, read_header

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from fuzz_mutations import spoil_safetensors
from fuzz_targets import _compare

QUICK = settings(max_examples=80, deadline=None, database=None, derandomize=True)
LONG = settings(max_examples=5000, deadline=None, database=None)
# what the library reads as whole elements in all its versions
DTYPES = [name for name in DTYPE_BYTES if name != "F8_E8M0"]
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(
    lambda name: name != "__metadata__"
)
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)), max_size=6
)
METADATA = st.none() | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), NAMES)


def size_of(dtype: str, shape: list[int]) -> int:
    size = DTYPE_BYTES[dtype]
    for count in shape:
        size *= count
    return size


def file_of(header: bytes, body: bytes, path: Path) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def valid(tensors: dict[str, Any], metadata: Any, rng: random.Random) -> tuple[bytes, bytes]:
    """A header with its tensors in any order, in the file and in the text."""
    entries: dict[str, Any] = {}
    at = 0
    for name in rng.sample(list(tensors), len(tensors)):
        dtype, shape = tensors[name]
        end = at + size_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    names = rng.sample(list(entries), len(entries))
    content = {name: entries[name] for name in names}
    if metadata is not None:
        content["__metadata__"] = metadata
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5).encode()
    return text + b" " * rng.choice((0, -len(text) % 8)), rng.randbytes(at)


def check_valid(tensors: dict[str, Any], metadata: Any, seed: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        header, body = valid(tensors, metadata, random.Random(seed))
        infos = read_header(file_of(header, body, Path(place) / "x.safetensors"))
        found = {name: (info.dtype, list(info.shape)) for name, info in infos.items()}
        assert found == tensors
        _compare(infos)


def check_spoiled(tensors: dict[str, Any], seed: int) -> None:
    """Whatever we accept, the library accepts, with the same names, shapes, dtypes and bytes."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        path = file_of(*valid(tensors, {"format": "pt"}, rng), Path(place) / "x.safetensors")
        path.write_bytes(spoil_safetensors(path.read_bytes(), rng))
        try:
            infos = read_header(path)
        except WeightsError as error:
            assert str(error.where) == str(path) and error.fix
            return
        _compare(infos)


@given(TENSORS, METADATA, st.integers(0, 2**32))
@QUICK
def test_a_valid_file_means_the_same_here_and_there(
    tensors: dict[str, Any], metadata: Any, seed: int
) -> None:
    check_valid(tensors, metadata, seed)


@given(TENSORS, st.integers(0, 2**32))
@QUICK
def test_what_is_accepted_the_library_accepts(tensors: dict[str, Any], seed: int) -> None:
    check_spoiled(tensors, seed)


@pytest.mark.slow
@given(TENSORS, METADATA, st.integers(0, 2**32))
@LONG
def test_a_valid_file_means_the_same_here_and_there_long(
    tensors: dict[str, Any], metadata: Any, seed: int
) -> None:
    check_valid(tensors, metadata, seed)
    check_spoiled(tensors, seed)


def one(**changes: Any) -> str:
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}
    return json.dumps({"a": entry})


GOOD = one()
TWO = '{"a":%s,"b":%s}'
ENTRY = '{"dtype":"U8","shape":[%s],"data_offsets":[%s]}'
BAD: dict[str, tuple[str | bytes, bytes]] = {
    "negative": (one(data_offsets=[-2, 0]), b"xx"),
    "negative size": (one(shape=[-2]), b"xx"),
    "bool": (one(shape=[True, 2]), b"xx"),
    "float": (one(shape=[2.0]), b"xx"),
    "huge": (one(shape=[0, 2**63]), b""),
    "huge offset": (one(data_offsets=[2**64, 2**64 + 2]), b"xx"),
    "overflow times zero": (one(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), b""),
    "overlap": (TWO % (ENTRY % (2, "0,2"), ENTRY % (2, "1,3")), b"xxx"),
    "gap": (TWO % (ENTRY % (1, "0,1"), ENTRY % (1, "2,3")), b"xxx"),
    "backwards": (one(data_offsets=[2, 0]), b"xx"),
    "three offsets": (one(data_offsets=[0, 2, 2]), b"xx"),
    "no offsets": ('{"a":{"dtype":"U8","shape":[2]}}', b"xx"),
    "unknown dtype": (one(dtype="U7"), b"xx"),
    "dtype of a list": (one(dtype=["U8"]), b"xx"),
    "too short": (GOOD, b"x"),
    "too long": (GOOD, b"xxx"),
    "metadata of a number": ('{"__metadata__":{"a":1},"a":%s}' % (ENTRY % (1, "0,1")), b"x"),
    "metadata of text": ('{"__metadata__":"pt","a":%s}' % (ENTRY % (1, "0,1")), b"x"),
    "deep": ("[" * 5000 + "]" * 5000, b""),
    "deep inside": (one(shape=[2]).replace("[2]", "[" * 900 + "]" * 900), b"xx"),
    "digits": (GOOD.replace("[2]", "[" + "9" * 5000 + "]"), b"xx"),
    "UTF-8 that is none": (b'{"\xff":' + (ENTRY % (1, "0,1")).encode() + b"}", b"x"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_forged_header_is_refused(tmp_path: Path, name: str) -> None:
    header, body = BAD[name]
    text = header if isinstance(header, bytes) else header.encode()
    path = file_of(text, body, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as caught:
        read_header(path)
    assert str(caught.value.where) == str(path) and caught.value.fix


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", length) + GOOD.encode())
        stream.truncate(10**8 + 100)  # a hole: nothing is on the disk
    with pytest.raises(WeightsError, match="no safetensors header"):
        read_header(path)


# Accepted once, and refused or read otherwise by the safetensors library.
WAS_ACCEPTED: dict[str, tuple[bytes, bytes]] = {
    "a name twice": (
        f'{{"a":{ENTRY % (1, "0,1")},"a":{ENTRY % (1, "0,1")}}}'.encode(),
        b"x",
    ),
    "a shape of text": (one(shape="", data_offsets=[0, 1]).encode(), b"x"),
    "a shape of an object": (one(shape={}, data_offsets=[0, 1]).encode(), b"x"),
    "minus zero": (GOOD.replace("[0, 2]", "[-0, 2]").encode(), b"xx"),
    "UTF-16": (GOOD.encode("utf-16"), b"xx"),
    "half a character": (GOOD.replace('"a"', '"\\ud800"').encode(), b"xx"),
    "NaN beside": (GOOD.replace("}}", ', "z": NaN}}').encode(), b"xx"),
    "deep beside": (GOOD.replace("}}", ', "z": ' + "[" * 200 + "]" * 200 + "}}").encode(), b"xx"),
    "metadata of numbers": (
        ('{"__metadata__":{"a":[1]},"a":%s}' % (ENTRY % (1, "0,1"))).encode(),
        b"x",
    ),
}


@pytest.mark.parametrize("name", WAS_ACCEPTED)
def test_bug_a_header_was_accepted_that_has_two_meanings(tmp_path: Path, name: str) -> None:
    path = file_of(*WAS_ACCEPTED[name], tmp_path / "x.safetensors")
    with pytest.raises(WeightsError):
        read_header(path)
    if name != "a name twice":  # of these the library takes the last
        with pytest.raises(SafetensorError):
            safe_open(path, framework="pt")


def test_bug_a_shape_of_many_large_sizes_was_multiplied_out(tmp_path: Path) -> None:
    header = one(shape=[2**62] * 200_000, data_offsets=[0, 0]).encode()
    path = file_of(header, b"", tmp_path / "x.safetensors")
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="more elements than can be counted"):
        read_header(path)
    assert time.perf_counter() - start < 5


def test_bug_a_pipe_as_a_shard_was_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no regular file"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(WeightsError, match="no regular file"):
        read_checkpoint(tmp_path)


def sharded(directory: Path) -> dict[str, str]:
    directory.mkdir()
    table = {"a": "one.safetensors", "b": "two.safetensors"}
    for name, shard in table.items():
        save_file({name: torch.ones(2)}, directory / shard)
    return table


def index_of(directory: Path, table: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": table}))


OUTSIDE = [
    *("../one.safetensors", "/one.safetensors", "./one.safetensors", "x/../one.safetensors", ".."),
    *(".", "", "..\\one.safetensors", "C:one.safetensors", "one.safetensors\n", "one\0", "a" * 256),
    *("\ud800.safetensors", "\x1b[2J", "one.safetensors/", "\\\\host\\share\\x"),
    *(None, 7, True, 1.5, ["one.safetensors"], {"file": "one.safetensors"}),
]


@pytest.mark.parametrize("shard", OUTSIDE, ids=repr)
def test_no_index_leads_out_of_its_directory(tmp_path: Path, shard: Any) -> None:
    model = tmp_path / "model"
    table: dict[str, Any] = sharded(model)
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index_of(model, {**table, "a": shard})
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(model)
    assert str(caught.value.where) == str(model / INDEX)
    assert not is_plain_name(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "twice"),
        ('{"weight_map": {"a": "one.safetensors"}, "weight_map": {}}', "twice"),
        ('{"weight_map": NaN}', "no number"),
        ('{"a":' * 9000 + "1" + "}" * 9000, "deep|malformed"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(content)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop("b"), None),  # a shard that no index names is no part of it
        (lambda table: table.update(c="one.safetensors"), "which it is not"),
        (lambda table: table.update(a="two.safetensors"), "a"),
        (lambda table: table.update(b="three.safetensors"), "missing"),
        (lambda table: table.update(b="sub"), "regular|cannot read"),
    ],
)
def test_index_and_shards_agree(
    tmp_path: Path, change: Callable[[dict[str, str]], Any], message: str | None
) -> None:
    table = sharded(tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    change(table)
    index_of(tmp_path / "model", table)
    if message is None:
        assert list(read_checkpoint(tmp_path / "model")) == ["a"]
        return
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / "model")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    index_of_blobs = sharded(blobs)
    index_of(blobs, index_of_blobs)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    assert sorted(read_checkpoint(snapshot)) == ["a", "b"]


def test_strict_json_is_quick_with_many_doubles() -> None:
    names = ",".join(f'"{n}":0' for n in range(50_000))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="'7' stands there twice"):
        strict_json(f'{{{names},"7":1}}'.encode())
    assert time.perf_counter() - start < 5
