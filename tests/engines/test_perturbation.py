"""Every tensor of a checkpoint matters to both engines, and to both alike.

Each source tensor is changed alone; the logits of the hf and of the megatron engine must then
change, by the same. An engine that ignores a tensor, or has it in another place, fails here even
where the weights of a test happen to hide it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.source import open_source
from autodeco.engines.base import Engine, TokenBatch
from autodeco.engines.hf import HFEngine
from autodeco.engines.select import build_engine
from autodeco.job import Job
from autodeco.training.batching import pack
from autodeco.training.data import Sample
from autodeco_plugin_qwen3.family import FAMILY

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

LENGTHS = (40, 7, 65)  # enough tokens for every expert to be chosen
SEEN = 1e-2  # logits are of the order of 1
SAME = 5e-5


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves no process group to other tests of this process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    yield
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def some_batch(vocab_size: int) -> TokenBatch:
    random = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = random.integers(0, vocab_size, length).astype(np.int32)
        samples.append(Sample(number, ids, np.arange(length) < length - 1, number + 1))
    return pack(samples)


def logits(engine: Engine) -> Tensor:
    (states,) = engine.hidden_states([some_batch(engine.vocab_size)])
    assert states is not None
    return states.h @ engine.output_weight().weight.T


def of_both(model: Path, preset: str) -> tuple[Tensor, Tensor]:
    job = Job(model=model, preset=preset, engine="megatron", device="cpu", dtype="float32")
    megatron = build_engine(job, open_source(FAMILY, job), FAMILY)
    return logits(HFEngine(model, torch.device("cpu"), torch.float32)), logits(megatron)


def changed(name: str, tensor: Tensor) -> Tensor:
    """The tensor with noise as large as its values vary; the same noise in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return tensor + tensor.std() * torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize(("preset", "count"), [("debug", 35), ("debug-moe", 69)])
def test_each_tensor_changes_the_logits_of_both_engines_alike(
    tmp_path: Path, preset: str, count: int
) -> None:
    model = write_random_checkpoint(FAMILY, FAMILY.preset(preset), tmp_path / "model")
    before = of_both(model, preset)
    torch.testing.assert_close(*before, rtol=0, atol=SAME)
    file = model / "model.safetensors"
    tensors = load_file(file)
    assert len(tensors) == count
    wrong = {}
    for name, tensor in tensors.items():
        file.unlink()  # the loaded tensors are views of the first one, which lives on unnamed
        save_file({**tensors, name: changed(name, tensor)}, file, metadata={"format": "pt"})
        after = of_both(model, preset)
        hf, megatron = (new - old for new, old in zip(after, before, strict=True))
        sizes = [float(delta.abs().max()) for delta in (hf, megatron, hf - megatron)]
        if min(sizes[:2]) < SEEN or sizes[2] > SAME:
            wrong[name] = sizes
    assert not wrong
