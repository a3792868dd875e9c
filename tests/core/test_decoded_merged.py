"""A merged checkpoint in FP8 or MXFP4 is loaded as the engine loads its base: decoded, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from format_tools import QUANTIZED, demo, family_of

from autodeco.cli import cli
from autodeco.convert.source import open_source
from autodeco.decoding.model import load_decoded
from autodeco.engines.hf import HFEngine, stores_parts
from autodeco.errors import WeightsError
from autodeco.heads.files import save_heads
from autodeco.heads.identity import base_identity
from autodeco.heads.merge import LAYOUTS, merge
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.job import Job


@pytest.fixture(params=[(family, layout) for family in QUANTIZED for layout in LAYOUTS], ids=str)
def merged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    family, layout = request.param
    identity = base_identity(demo(family))
    torch.manual_seed(0)
    heads = DecodingHeads(HeadsConfig(identity["hidden_size"]))
    save_heads(tmp_path / "heads", heads, metadata=identity)
    merge(demo(family), tmp_path / "heads", tmp_path / "merged", layout=layout, copy=True)
    return family, tmp_path / "merged"


def test_bug_a_merged_model_in_parts_wanted_accelerate(merged: tuple[str, Path]) -> None:
    family, path = merged
    spec = family_of(family)
    job = Job(plugin=family, preset=spec.presets[0].name, model=demo(family))
    dropped = open_source(spec, job).weight_map.dropped
    engine = HFEngine(demo(family), torch.device("cpu"), torch.float32, dropped=dropped)
    assert stores_parts(path)
    model = load_decoded(path, path, torch.float32)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, return_autodeco=True)
        assert torch.equal(out.logits, engine.model(ids).logits)
    assert out.temperature.shape == (2, 16) and bool((out.temperature > 0).all())
    command = ["generate", "--model", str(path), "--prompt", "12 + 3", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli, [*command, "--max-new-tokens", "4"])
    assert done.exception is None, done.exception
    assert len(json.loads(done.stdout)["tokens"]) >= 1


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = demo("gpt_oss")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    identity = base_identity(source)
    heads = DecodingHeads(HeadsConfig(identity["hidden_size"]))
    save_heads(tmp_path / "heads", heads, metadata=identity)
    with pytest.raises(WeightsError, match=r"1 tensors are missing, the first is 'model.norm.w"):
        load_decoded(tmp_path, tmp_path / "heads", torch.float32)
