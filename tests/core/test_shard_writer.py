"""The safetensors library reads what the writer writes; what is not whole never appears."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from autodeco.convert.shard_writer import ShardWriter, plan_shard
from autodeco.errors import EnvironmentProblem, WeightsError
from autodeco.safetensors_header import read_header

TENSORS = {
    "a": torch.arange(15, dtype=torch.float32).view(3, 5),
    "b": torch.arange(7, dtype=torch.uint8),
    "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
}
NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}


def plan():  # type: ignore[no-untyped-def]
    return plan_shard((n, NAMES[t.dtype], tuple(t.shape)) for n, t in TENSORS.items())


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_threads_write_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, plan()) as writer:

        def work(name: str) -> None:
            data = raw(TENSORS[name])
            for at in reversed(range(0, len(data), 3)):
                writer.write(name, at, data[at : at + 3])

        threads = [threading.Thread(target=work, args=(name,)) for name in TENSORS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not path.exists()
    found = load_file(path)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in TENSORS.items()
    }
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
    assert {n: i.start for n, i in read_header(path).items()} == {
        n: s.start for n, s in plan().tensors.items()
    }
    assert path.stat().st_size == plan().size


@pytest.mark.parametrize("missing", ["a", "b"])
def test_a_file_that_is_not_whole_does_not_appear(tmp_path: Path, missing: str) -> None:
    with (
        pytest.raises(WeightsError, match=f"the first is '{missing}'"),
        ShardWriter(tmp_path / "x", plan()) as writer,
    ):
        for name, tensor in TENSORS.items():
            writer.write(name, 0, raw(tensor)[: -1 if name == missing else None])
    assert list(tmp_path.iterdir()) == []


def test_bytes_beyond_a_tensor_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(WeightsError, match="lie outside it"),
        ShardWriter(tmp_path / "x", plan()) as writer,
    ):
        writer.write("b", 1, raw(TENSORS["b"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(EnvironmentProblem) as error, ShardWriter(tmp_path / "x", plan()) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, 0, raw(tensor))
    assert str(tmp_path / "x") in str(error.value)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
