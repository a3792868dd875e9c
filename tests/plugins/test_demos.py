"""The built-in models of all families: really trained, in their own storage format, run whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from autodeco import stories
from autodeco.convert.source import open_source
from autodeco.engines.select import hf_engine
from autodeco.family import FamilySpec
from autodeco.job import Job
from autodeco.registry import Registry

FAMILIES = ("qwen3", "qwen25", "llama31", "gpt_oss", "deepseek_v3")
PROBLEMS = 64
#: What published checkpoints of the family have beside plain tensors.
STORED = {
    "gpt_oss": {"_blocks": torch.uint8, "_scales": torch.uint8},
    "deepseek_v3": {"down_proj.weight": torch.float8_e4m3fn, "_scale_inv": torch.float32},
}


def family_of(name: str) -> FamilySpec:
    row = Registry().get(name)
    assert row.plugin is not None
    return row.plugin.family


def demo_of(family: FamilySpec) -> Path:
    folder = family.presets[0].checkpoint
    assert folder is not None, "the default preset is the built-in model"
    path = resources.files(family.package) / folder
    assert isinstance(path, Path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_small_and_of_its_familys_architecture_and_storage(name: str) -> None:
    family = family_of(name)
    demo = demo_of(family)
    assert sum(path.stat().st_size for path in demo.iterdir()) <= 3_000_000
    assert {path.suffix for path in demo.iterdir()} <= {".json", ".jinja", ".safetensors"}
    config = json.loads((demo / "config.json").read_text())
    architecture = family.architecture(family.presets[0].architecture)
    assert config["architectures"] == [architecture.name]
    assert architecture.shape_of(config, where=name) == family.presets[0].shape
    with safe_open(demo / "model.safetensors", "pt") as file:
        names = list(file.keys())
        for suffix, dtype in STORED.get(name, {"": torch.bfloat16}).items():
            found = [file.get_tensor(n).dtype for n in names if n.endswith(suffix)]
            assert found and set(found) == {dtype}, suffix


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_and_model_belong_together(name: str) -> None:
    demo = demo_of(family_of(name))
    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert len(tokenizer) == family_of(name).presets[0].shape.vocab_size
    for row in stories.records(9, "evaluation", 50, slips=0.1):
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert (
            ids == tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        )


def _solved(model: Any, tokenizer: Any, **decoding: Any) -> float:
    rows = list(stories.problems(17, "evaluation", PROBLEMS))
    encoded = tokenizer([row["problem"] for row in rows], return_tensors="pt", padding=True)
    encoded.pop("token_type_ids", None)
    out = model.generate(**encoded, max_new_tokens=110, **decoding)
    answers = tokenizer.batch_decode(
        out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    pairs = zip(answers, rows, strict=True)
    return sum(stories.check_answer(text, row["gt"]) for text, row in pairs) / PROBLEMS


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_solves_most_and_plain_sampling_fails_more_often(name: str) -> None:
    family = family_of(name)
    demo = demo_of(family)
    job = Job(plugin=name, preset="demo", model=demo, device="cpu", dtype="float32")
    model = hf_engine(job, open_source(family, job), torch.device("cpu"), torch.float32).model
    tokenizer = AutoTokenizer.from_pretrained(demo)
    torch.manual_seed(0)
    greedy = _solved(model, tokenizer, do_sample=False)
    sampled = _solved(model, tokenizer, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    assert greedy >= 0.8
    assert greedy - sampled >= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "megatron"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_built_in_model_goes_the_whole_way(name: str, engine: str, tmp_path: Path) -> None:
    if engine == "megatron":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    small = {"max-steps": 2, "global-batch": 8, "evaluate-problems": 4, "max-new-tokens": 16}
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "autodeco", "run", "--plugin", name, "--engine", engine]
    done = subprocess.run(
        [*command, *options, "--out", str(tmp_path), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    stages = [stage["stage"] for stage in summary["stages"]]
    assert stages == ["import", "build", "attach", "train", "export", "merge", "evaluate"]
    heads = Path(summary["run"]) / "heads"
    assert (heads / "model.safetensors").exists() and (heads / "config.json").exists()
