"""A run, its resumption, the engine and generate() on a GPU, against the CPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from autodeco.decoding import AutoDecoModelForCausalLM
from autodeco.engines.base import HiddenBatch
from autodeco.engines.hf import HFEngine
from autodeco.heads.warp import warp
from autodeco.pipeline import RunSummary, run_job
from autodeco.registry import Registry
from autodeco.run_directory import STAGES
from autodeco.settings import resolve
from autodeco.training.batching import microbatches
from autodeco.training.checkpoint import list_checkpoints
from autodeco.training.data import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAIN = STAGES[:4]


def run(out: Path, stages: tuple[str, ...] = STAGES, **options: Any) -> RunSummary:
    registry = Registry()
    values = {"plugin": "qwen3", "preset": "demo", "out": out, "device": "cuda", "max_steps": 12}
    values |= {"task_samples": 768, "evaluate_problems": 8, "save_every": 4, "eval_every": 4}
    job = resolve({**values, **options}, None, registry).job
    return run_job(job, registry=registry, stages=stages, console=Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole")).path


def last_heads(path: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(path / "checkpoints")[-1] / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_the_cpu(whole: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    samples = []
    for number, length in enumerate((60, 7, 33, 21)):
        predict = np.ones(length, dtype=np.bool_)
        predict[-1] = False
        ids = random.integers(8, 500, length).astype(np.int32)
        samples.append(Sample(number, ids, predict, number + 1))
    [batch] = microbatches(samples, 10_000)
    states = []
    for device, kind in (("cpu", torch.float32), ("cuda", getattr(torch, dtype))):
        engine = HFEngine(whole / "merged", torch.device(device), kind)
        [hidden] = engine.hidden_states([batch])
        assert isinstance(hidden, HiddenBatch)
        states.append(hidden.h.double().cpu())
    error = (states[0] - states[1]).norm() / states[0].norm()
    assert error < {"float32": 1e-4, "bfloat16": 3e-2}[dtype]


def test_training_learns_and_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    first = run(tmp_path, TRAIN, max_steps=12)
    heads = last_heads(first.path)
    assert all(torch.equal(heads[n], t) for n, t in last_heads(whole).items())
    for path in list_checkpoints(first.path / "checkpoints")[1:]:
        for file in path.iterdir():
            file.unlink()  # torn: training goes on from the one before
    (first.path / "stages" / "train.json").unlink()
    again = run(tmp_path, TRAIN, max_steps=12)
    assert again.path == first.path
    assert all(torch.equal(heads[n], t) for n, t in last_heads(again.path).items())


def test_heads_of_the_gpu_are_those_of_the_cpu_nearly(whole: Path, tmp_path: Path) -> None:
    cpu = run(tmp_path, TRAIN, device="cpu", dtype="float32", max_steps=3, save_every=3)
    gpu = run(tmp_path, TRAIN, dtype="float32", max_steps=3, save_every=3, name="gpu")
    one, other = last_heads(cpu.path), last_heads(gpu.path)
    a, b = (torch.cat([t.flatten() for t in h.values()]) for h in (one, other))
    assert (a - b).norm() / a.norm() < 1e-2


def test_generate_draws_from_the_predicted_nucleus(whole: Path) -> None:
    model = AutoDecoModelForCausalLM.from_pretrained(whole / "merged", dtype=torch.float32)
    model = model.to("cuda")
    torch.manual_seed(0)
    prompts = torch.randint(8, 500, (64, 12), device="cuda")
    model.generation_config.eos_token_id = None  # answers go on, so that there are many tokens
    out = model.generate(prompts, max_new_tokens=40, return_autodeco=True, pad_token_id=1)
    new = out.sequences[:, 12:]
    with torch.no_grad():
        logits = model(out.sequences).logits[:, 11:-1].float()
    t, p = out.temperature[:, : new.shape[1]], out.top_p[:, : new.shape[1]]
    allowed = warp(logits.flatten(0, 1), t.flatten(), (p + 1e-4).flatten()).isfinite()
    inside = allowed.gather(1, new.reshape(-1, 1))
    assert new.numel() >= 2000 and bool(inside.all())
    assert float(out.temperature.std()) > 0 and out.temperature.device.type == "cuda"
