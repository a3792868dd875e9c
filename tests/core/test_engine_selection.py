"""What `auto` means for engine, device and dtype, and what is said when it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_model

from autodeco.engines.hf import HFEngine
from autodeco.engines.select import build_engine, choose_device, choose_dtype
from autodeco.errors import EnvironmentProblem, UsageError
from autodeco.job import Job
from autodeco.registry import Registry
from autodeco.settings import resolve
from autodeco_plugin_qwen3.family import FAMILY

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == CPU


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_the_gpu_where_there_is_one_and_each_process_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_device("auto") == choose_device("cuda") == GPU
    assert choose_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == GPU  # a number that is given is meant


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match="CUDA is not available") as caught:
        choose_device(name)
    assert caught.value.where == "--device" and "--device cpu" in str(caught.value.fix)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cuda:2 is not there: .* shows 2 GPUs"):
        choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "5")  # more processes than GPUs
    with pytest.raises(EnvironmentProblem, match="cuda:5 is not there") as caught:
        choose_device("auto")
    assert caught.value.fix


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "mps"])
def test_a_device_on_which_no_engine_runs_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_device(name)
    assert repr(name) in caught.value.what and "cuda:N" in str(caught.value.fix)


def config_of(path: Path, **values: object) -> Path:
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_auto_dtype_is_float32_on_the_cpu(tmp_path: Path) -> None:
    assert choose_dtype("auto", config_of(tmp_path, dtype="bfloat16"), CPU) == torch.float32


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": None}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_auto_dtype_is_the_checkpoints_on_a_gpu(
    tmp_path: Path, values: dict[str, object], dtype: torch.dtype
) -> None:
    assert choose_dtype("auto", config_of(tmp_path, **values), GPU) == dtype


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_named_is_taken(tmp_path: Path, name: str, device: torch.device) -> None:
    path = config_of(tmp_path, dtype="float32" if name == "bfloat16" else "bfloat16")
    assert choose_dtype(name, path, device) == getattr(torch, name)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("engine", ["auto", "hf"])
def test_the_engine_is_hf_with_the_jobs_device_and_dtype(tmp_path: Path, engine: str) -> None:
    path = save_tiny(tiny_model(), tmp_path)
    weight_map = SimpleNamespace(dropped={})
    weights: Any = SimpleNamespace(path=path, formats=(), weight_map=weight_map)
    job = Job(preset="debug", engine=engine)
    made = build_engine(job, weights, FAMILY)
    assert isinstance(made, HFEngine) and made.name == "hf"
    assert (made.device, made.dtype) == (CPU, torch.float32)
    assert build_engine(job.replace(dtype="bfloat16"), weights, FAMILY).dtype == torch.bfloat16
    with pytest.raises(EnvironmentProblem):
        build_engine(job.replace(device="cuda"), weights, FAMILY)


@pytest.mark.parametrize(
    ("option", "value"), [("engine", "megatronn"), ("dtype", "float8"), ("dtype", "fp16")]
)
def test_an_engine_or_dtype_that_is_not_there_is_a_usage_error(option: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({"plugin": "qwen3", "preset": "debug", option: value}, None, Registry())
    assert value in str(caught.value) and option in str(caught.value)
