"""Merging and splitting byte by byte: what is shared, what is streamed, what comes back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_heads, tiny_heads, tiny_model

from autodeco import copying
from autodeco.cli import cli
from autodeco.errors import EnvironmentProblem, RunError, UsageError, WeightsError
from autodeco.heads import places
from autodeco.heads.merge import merge, split
from autodeco.heads.shards import in_threads
from autodeco.lock import file_lock
from autodeco.safetensors_header import read_whole_header

INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["one file", "shards"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    shard = "12KB" if request.param == "shards" else "5GB"
    return save_tiny(model, tmp_path / "base", shard, {"temperature": 0.6, "do_sample": True})


@pytest.fixture
def heads(base: Path, tmp_path: Path) -> Path:
    return save_tiny_heads(tmp_path / "heads", base)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another filesystem."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second filesystem here")
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        yield Path(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def state(directory: Path) -> dict[str, Any]:
    """Of each file all that a write would change; the number of links and its time may."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        fields = (status.st_ino, status.st_mtime_ns, status.st_blocks, status.st_size)
        found[str(path.relative_to(directory))] = (digest, *fields, status.st_mode)
    return found


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_the_base_is_not_touched(base: Path, heads: Path, tmp_path: Path, layout: str) -> None:
    before = state(base)
    path = merge(base, heads, tmp_path / "m", layout=layout).path
    split(path, tmp_path / "h", base=tmp_path / "b")
    assert state(base) == before


def test_linked_shards_are_neither_opened_to_write_nor_flushed(
    base: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = merge(base, heads, tmp_path / "m").path
    shards = {p.stat().st_ino for p in base.glob("*.safetensors")}
    assert shards and not shards & set(flushed)
    assert (path / "config.json").stat().st_ino in flushed


def _foreign(shard: Path) -> None:
    """The header of another writer: spaces, a field order of its own, room at the end."""
    header = read_whole_header(shard)
    data = shard.read_bytes()[header.start :]
    content = header.content()
    metadata = content.pop("__metadata__", {})
    entries = {
        name: {"data_offsets": e["data_offsets"], "shape": e["shape"], "dtype": e["dtype"]}
        for name, e in sorted(content.items(), reverse=True)
    }
    text = json.dumps({**entries, "__metadata__": {**metadata, "ä": "b"}}).encode() + b" " * 37
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("writer", ["safetensors", "another"])
@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_split_gives_back_every_byte(
    base: Path, tmp_path: Path, layout: str, writer: str, dtype: str
) -> None:
    if writer == "another":
        for shard in base.glob("*.safetensors"):
            _foreign(shard)
    heads = save_tiny_heads(tmp_path / "heads", base, dtype=dtype)
    path = merge(base, heads, tmp_path / "m", layout=layout).path
    split(path, tmp_path / "h", base=tmp_path / "b")
    assert contents(tmp_path / "h") == contents(heads)
    before, after = contents(base), contents(tmp_path / "b")
    assert before.keys() == after.keys()
    assert {n for n in before if before[n] != after[n]} <= {"generation_config.json"}
    name = "generation_config.json"
    assert json.loads(before[name]) == json.loads(after[name])


def test_the_autodeco_layout_streams_the_data(base: Path, heads: Path, tmp_path: Path) -> None:
    path = merge(base, heads, tmp_path / "m", layout="autodeco").path
    shards = sorted(base.glob("*.safetensors"))
    for shard, merged in zip(shards, sorted(path.glob("model-*.safetensors")), strict=True):
        old, new = read_whole_header(shard), read_whole_header(merged)
        assert (len(new.raw)) % 8 == 0
        assert shard.read_bytes()[old.start :] == merged.read_bytes()[new.start :]
        assert list(new.tensors) == ["llm." + name for name in old.tensors]


@pytest.mark.parametrize("way", ["in the kernel", "by us", "in short pieces"])
def test_a_copy_is_whole_whatever_the_kernel_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    data = os.urandom(3 * 64 * 1024 + 11)
    (tmp_path / "a").write_bytes(data)
    calls = []
    real = os.copy_file_range

    def ranged(source: int, target: int, count: int, *at: int) -> int:
        calls.append(count)
        if way == "by us":
            raise OSError(errno.EXDEV, "other filesystem")
        return real(source, target, min(count, 50_000), *at)

    monkeypatch.setattr(os, "copy_file_range", ranged) if way != "in the kernel" else None
    monkeypatch.setattr(copying, "_BUFFER", 10_000)
    told: list[int] = []
    assert copying.copy_file(tmp_path / "a", tmp_path / "b", told.append) == len(data)
    assert (tmp_path / "b").read_bytes() == data and sum(told) == len(data)
    assert len(calls) >= {"in the kernel": 0, "by us": 1, "in short pieces": 4}[way]


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (
        (tmp_path / "a").open("rb") as stream,
        pytest.raises(EnvironmentProblem, match="cut short"),
    ):
        copying.write_file(tmp_path / "b", b"", [(stream.fileno(), 50, 100)])


def test_the_first_failure_stops_the_other_threads() -> None:
    done = []

    def long(advance: copying.Advance) -> int:
        for piece in range(10_000_000):
            advance(1)
            done.append(piece)
        return 1

    def failing(advance: copying.Advance) -> int:
        raise EnvironmentProblem("disk full")

    with pytest.raises(EnvironmentProblem, match="disk full"):
        in_threads([long, failing, long], lambda size: None)
    assert len(done) < 10_000_000


def test_across_filesystems_copy_is_asked_for_first(
    base: Path, heads: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be linked") as refused:
        merge(base, heads, elsewhere / "new" / "m")
    text = str(refused.value)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    assert str(base) in text and str(elsewhere) in text and f"{size:,}" in text
    assert "--copy" in text and not list(elsewhere.iterdir())
    report = merge(base, heads, elsewhere / "m", copy=True)
    assert report.copied and not report.linked
    for shard in base.glob("*.safetensors"):
        assert (report.path / shard.name).read_bytes() == shard.read_bytes()
    with pytest.raises(EnvironmentProblem, match="--copy"):
        split(report.path, base.parent / "h", base=base.parent / "b")
    assert split(report.path, base.parent / "h", base=base.parent / "b", copy=True).is_dir()
    rewritten = merge(base, heads, elsewhere / "rewritten", layout="autodeco").path
    split(rewritten, base.parent / "h2", base=base.parent / "b2")
    monkeypatch.setattr(places, "require_space", _no_room)
    for more in ({"copy": True}, {"layout": "autodeco"}):
        with pytest.raises(EnvironmentProblem, match="no room"):
            merge(base, heads, elsewhere / "late", **more)  # type: ignore[arg-type]
    assert not list(elsewhere.glob("*late*"))


def _no_room(path: Path, size: int, what: str) -> None:
    raise EnvironmentProblem("no room")


def test_a_run_asks_before_it_begins(base: Path, elsewhere: Path) -> None:
    """The refusal costs no training, and leaves no run."""
    from importlib import resources

    demo = Path(str(resources.files("autodeco_plugin_qwen3") / "demo"))
    out = elsewhere / "runs"
    options = ["run", "--plugin", "qwen3", "--model", str(demo), "--out", str(out)]
    with pytest.raises(EnvironmentProblem, match="cannot be linked"):
        CliRunner().invoke(cli, options, catch_exceptions=False)
    assert not out.exists()


def test_who_cannot_write_there_is_told_that(
    base: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "link", denied)
    with pytest.raises(EnvironmentProblem, match="Permission denied") as refused:
        merge(base, heads, tmp_path / "m")
    assert "--copy" not in str(refused.value)


def _edit_index(base: Path, change: Any) -> None:
    content = json.loads((base / INDEX).read_text())
    change(content["weight_map"])
    (base / INDEX).write_text(json.dumps(content))


def _shards(tmp_path: Path) -> tuple[Path, Path]:
    base = save_tiny(tiny_model(tie_word_embeddings=True), tmp_path / "base", "24KB")
    return base, save_tiny_heads(tmp_path / "heads", base)


@pytest.mark.parametrize("layout", ["native", "autodeco"])
@pytest.mark.parametrize("fault", ["surplus", "absent", "elsewhere", "twice"])
def test_index_and_shards_must_agree(tmp_path: Path, fault: str, layout: str) -> None:
    base, heads = _shards(tmp_path)
    name, other = "model.norm.weight", sorted(p.name for p in base.glob("*.safetensors"))[0]
    if fault == "surplus":
        _edit_index(base, lambda table: table.pop(name))
    elif fault == "absent":
        _edit_index(base, lambda table: table.update({"model.more.weight": other}))
    elif fault == "elsewhere":
        _edit_index(base, lambda table: table.update({name: other}))
    else:
        tensors = load_file(base / other)
        save_file({**tensors, name: torch.zeros(32)}, base / other, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"index|two shards"):
        merge(base, heads, tmp_path / "m", layout=layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "heads"]


def test_heads_of_another_vocabulary(base: Path, heads: Path, tmp_path: Path) -> None:
    larger = save_tiny(tiny_model(vocab_size=101), tmp_path / "larger")
    with pytest.raises(WeightsError, match="vocab_size is 97 there, 101"):
        merge(larger, heads, tmp_path / "m")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"vocab_size": 101}, None])
def test_published_heads_are_compared_size_by_size(
    base: Path, tmp_path: Path, change: dict[str, int] | None
) -> None:
    config = json.loads((base / "config.json").read_text())
    published = tmp_path / "published"
    published.mkdir()
    save_file(tiny_heads().state_dict(), published / "model.safetensors")
    extra = {"model_type": "autodeco", "base_model_type": "qwen3", "num_experts": 0}
    (published / "config.json").write_text(json.dumps({**config, **extra, **(change or {})}))
    if change is None:
        assert merge(base, published, tmp_path / "m").path.is_dir()
        return
    with pytest.raises(WeightsError, match=next(iter(change))):
        merge(base, published, tmp_path / "m")


def test_a_forged_header_of_the_base_is_refused(tmp_path: Path) -> None:
    base, heads = _shards(tmp_path)
    for shard in base.glob("*.safetensors"):
        _foreign(shard)
    path = merge(base, heads, tmp_path / "m", layout="autodeco").path
    one, other = sorted(path.glob("model-*.safetensors"))[:2]
    carried = read_whole_header(other).content()["__metadata__"]
    save_file(load_file(one), one, metadata=carried)
    with pytest.raises(WeightsError, match="is not that of this file's data"):
        split(path, tmp_path / "h", base=tmp_path / "b")
    assert not (tmp_path / "b").exists() and not (tmp_path / "h").exists()


def test_what_a_killed_merge_left_is_cleared(base: Path, heads: Path, tmp_path: Path) -> None:
    left = tmp_path / ".m.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    others = tmp_path / ".other.0123abcd.partial"
    others.mkdir()
    merge(base, heads, tmp_path / "m")
    assert not left.exists() and others.exists()
    assert not list(tmp_path.glob("*.lock"))


def test_two_merges_into_one_output(base: Path, heads: Path, tmp_path: Path) -> None:
    lock = file_lock(tmp_path / ".m.lock", "the output", tmp_path / "m", "wait")
    with pytest.raises(RunError, match="in use by process"):
        merge(base, heads, tmp_path / "m")
    lock.remove()
    merge(base, heads, tmp_path / "m")


@pytest.mark.parametrize("more", [[], ["--copy"], ["--merge", "autodeco"]])
def test_a_dry_run_checks_and_writes_nothing(
    base: Path, heads: Path, tmp_path: Path, more: list[str]
) -> None:
    line = ["merge", "--model", str(base), "--heads-dir", str(heads), "--output"]
    planned = CliRunner().invoke(cli, [*line, str(tmp_path / "m"), *more, "--dry-run"])
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    assert planned.exit_code == 0 and f"{size if more else 0:,} bytes written" in planned.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "heads"]
    (heads / "model.safetensors").write_bytes(b"")
    refused = CliRunner().invoke(cli, [*line, str(tmp_path / "m"), *more, "--dry-run"])
    assert isinstance(refused.exception, WeightsError)


def test_a_half_done_split_goes_on(base: Path, heads: Path, tmp_path: Path) -> None:
    path = merge(base, heads, tmp_path / "m", layout="autodeco").path
    split(path, tmp_path / "h", base=tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    split(path, tmp_path / "h", base=tmp_path / "b")
    assert (tmp_path / "b" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "h" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="exists already"):
        split(path, tmp_path / "h", base=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_merged_data_begins_at_the_same_place_of_a_block(
    base: Path, heads: Path, tmp_path: Path
) -> None:
    """Filesystems with reflinks then share the blocks of the renamed shards as well."""
    path = merge(base, heads, tmp_path / "m", layout="autodeco").path
    shards = sorted(base.glob("*.safetensors"))
    for shard, merged in zip(shards, sorted(path.glob("model-*.safetensors")), strict=True):
        starts = read_whole_header(shard).start, read_whole_header(merged).start
        assert starts[0] % 4096 == starts[1] % 4096
