"""A direct reader returns the blocks that the safetensors library returns, in the written dtype."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest
import torch
from format_tools import random_fp8, random_mxfp4, same_bf16
from safetensors.torch import save_file

from autodeco.convert.direct_reader import DirectReader
from autodeco.convert.formats import decode_fp8_blocks, decode_mxfp4
from autodeco.errors import WeightsError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    fp8, mx = random_fp8(300, 259, torch.float32), random_mxfp4((3, 64, 10))
    tensors = {
        "plain": torch.arange(3 * 4 * 5, dtype=torch.float32).view(3, 4, 5),
        "one": torch.tensor(7.0, dtype=torch.float16),
        "none": torch.empty(0, 3),
        "w": fp8["weight"],
        "w_scale_inv": fp8["scale"],
        "e_blocks": mx["blocks"],
        "e_scales": mx["scales"],
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_every_block_of_a_plain_tensor(checkpoint: Path) -> None:
    whole = torch.arange(60, dtype=torch.float32).view(3, 4, 5)
    spans = [[(a, b) for a in range(n) for b in range(a, n + 1)] for n in whole.shape]
    with DirectReader(checkpoint) as reader:
        for region in itertools.product(*spans):
            expected = whole[tuple(slice(a, b) for a, b in region)]
            assert torch.equal(reader.read("plain", region), expected), region
        assert torch.equal(reader.read("plain"), whole)
        assert torch.equal(reader.read("one"), torch.tensor(7.0, dtype=torch.float16))
        assert reader.read("none").shape == (0, 3)


@pytest.mark.parametrize("plainly", [False, True])
def test_stored_parts_come_rounded_and_in_blocks(checkpoint: Path, plainly: bool) -> None:
    fp8, mx = random_fp8(300, 259, torch.float32), random_mxfp4((3, 64, 10))
    expected = {"w": decode_fp8_blocks(fp8).bfloat16(), "e": decode_mxfp4(mx).bfloat16()}
    with DirectReader(checkpoint, plainly=plainly) as reader:
        for name, tensor in expected.items():
            assert same_bf16(reader.read(name), tensor)
        assert same_bf16(reader.read("w", ((130, 299), (5, 259))), expected["w"][130:299, 5:259])
        assert same_bf16(
            reader.read("e", ((1, 3), (33, 40), (2, 9))), expected["e"][1:3, 33:40, 2:9]
        )


def test_threads_share_a_reader(checkpoint: Path) -> None:
    with DirectReader(checkpoint) as reader:
        expected, wrong = reader.read("w"), []

        def work() -> None:
            for _ in range(20):
                if not torch.equal(reader.read("w"), expected):
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_file_that_was_cut_short_meanwhile_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    with DirectReader(checkpoint) as reader:
        os.truncate(file, file.stat().st_size - 100)
        last = max(reader.tensors.values(), key=lambda t: next(iter(t.parts.values())).start)
        with pytest.raises(WeightsError, match="the file ends within tensor") as error:
            reader.read(last.name)
        assert str(file) in str(error.value)


def test_an_unreadable_disk_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with DirectReader(checkpoint) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(WeightsError, match="cannot read tensor 'plain': Input/output error"):
            reader.read("plain")
