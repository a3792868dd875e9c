"""`export --target hf-peft` from a NeMo 2 checkpoint: the heads, and no byte of the backbone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_torch_dist_reader import Counted
from torch_dist_made import write

from autodeco.cli import cli
from autodeco.convert.adapter_heads import head_keys, read_adapter_heads, weights_directory
from autodeco.errors import UsageError, WeightsError
from autodeco.heads.files import load_heads
from autodeco.heads.modules import DecodingHeads, HeadsConfig

WIDTH = 48
BACKBONE = "module.decoder.layers.mlp.linear_fc1.weight"


def heads_of(**changes: Any) -> DecodingHeads:
    heads = DecodingHeads(HeadsConfig(WIDTH, **changes))
    drawn = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in heads.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=drawn).bfloat16())
    return heads


def nemo(
    directory: Path,
    heads: dict[str, torch.Tensor],
    prefix: str = "module.adapter.",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A checkpoint with a backbone of 4 MB in the same file and in another, and an optimizer."""
    mine = {prefix + name: tensor.to(dtype) for name, tensor in heads.items()}
    moments = {f"optimizer.state.exp_avg.{key}": torch.zeros_like(t) for key, t in mine.items()}
    backbone = {BACKBONE: torch.zeros(2, 1 << 20, dtype=torch.bfloat16)}
    chunks = {BACKBONE: [((0, 0), (1, 1 << 20)), ((1, 0), (1, 1 << 20))]}
    write(
        directory / "weights",
        {**moments, **backbone, **mine},
        chunks=chunks,
        file_of=lambda key, offset: int(key == BACKBONE and offset[0] == 1),
        objects=["module.adapter.temp_head._extra_state/shard_0_1"],
    )
    (directory / "weights" / "common.pt").write_bytes(b"never opened")
    return directory


def export(*options: Any, code: int = 0) -> str:
    result = CliRunner(catch_exceptions=True).invoke(cli, ["export", *map(str, options)])
    if code == 0:
        assert result.exit_code == 0, result.output + repr(result.exception)
    else:
        assert result.exception is not None
        if not isinstance(result.exception, SystemExit):
            raise result.exception
    return result.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    config = {"model_type": "qwen3", "hidden_size": WIDTH, "_name_or_path": "Someone/Base-1B"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("prefix", ["module.adapter.", "adapter.", "", "module.module.adapter."])
@pytest.mark.parametrize("place", ["", "weights"])
def test_the_heads_come_out_as_they_went_in(tmp_path: Path, prefix: str, place: str) -> None:
    heads, source = heads_of(), tmp_path / "run" / "model--val_loss=1.2-step=9-last"
    nemo(source, heads.state_dict(), prefix)
    output = tmp_path / "heads"
    export("--input", source / place, "--output", output, "--target", "hf-peft")
    loaded = load_heads(output)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.heads.state_dict()[name], tensor), name
    assert loaded.metadata["checkpoint"] == source.name
    assert loaded.metadata["stored_dtype"] == "bfloat16"
    assert loaded.metadata["base_model_name_or_path"] is None


def test_the_base_is_recorded_and_must_have_the_width(tmp_path: Path, model: Path) -> None:
    source = nemo(tmp_path / "checkpoint", heads_of().state_dict())
    export("--input", source, "--output", tmp_path / "heads", "--model", model)
    metadata = load_heads(tmp_path / "heads").metadata
    assert metadata["base_model_name_or_path"] == "Someone/Base-1B"
    assert metadata["base_config_sha256"]
    (model / "config.json").write_text(json.dumps({"hidden_size": WIDTH + 1}))
    with pytest.raises(WeightsError, match="width 48"):
        export("--input", source, "--output", tmp_path / "b", "--model", model, code=5)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("heads", ["temperature", "top-p"])
def test_one_head_alone(tmp_path: Path, model: Path, heads: str) -> None:
    mine = heads_of(heads=heads)
    source = nemo(tmp_path / "checkpoint", mine.state_dict())
    export("--input", source, "--output", tmp_path / "out", "--model", model)
    assert load_heads(tmp_path / "out").heads.config == mine.config


def test_only_the_bytes_of_the_heads_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = nemo(tmp_path / "checkpoint", heads_of().state_dict())
    size = sum(t.numel() * 2 for t in heads_of().state_dict().values())
    counted = Counted(monkeypatch)
    read_adapter_heads(source / "weights")
    assert set(counted.read) == {"__0_0.distcp"}
    assert counted.read["__0_0.distcp"] < size + 8 * 2500  # archives' directories and descriptions


def test_the_backbones_files_need_not_be_there(tmp_path: Path) -> None:
    source = nemo(tmp_path / "checkpoint", heads_of().state_dict())
    (source / "weights" / "__1_0.distcp").unlink()
    assert read_adapter_heads(source / "weights")[1] == "bfloat16"
    os.truncate(source / "weights" / "__0_0.distcp", 50_000)
    with pytest.raises(WeightsError, match="goes on to"):
        read_adapter_heads(source / "weights")


def _without(name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in heads_of().state_dict().items() if k != name}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, "no heads"),
        (_without("temp_head.mlp.2.bias"), "temp_head.mlp.2.bias is missing"),
        (_without("top_p_head.mlp.0.weight"), "top_p_head.mlp.0.weight is missing"),
        ({**heads_of().state_dict(), "temp_head.mlp.4.bias": torch.ones(1)}, "no tensor of the"),
        ({**heads_of().state_dict(), "temp_head.mlp.2.bias": torch.ones(2)}, "has shape"),
        (
            {**heads_of().state_dict(), "temp_head.mlp.2.bias": torch.tensor([torch.nan])},
            "not finite",
        ),
    ],
)
def test_what_is_no_pair_of_heads_is_refused(
    tmp_path: Path, heads: dict[str, torch.Tensor], message: str
) -> None:
    source = nemo(tmp_path / "checkpoint", heads)
    with pytest.raises(WeightsError, match=message) as error:
        export("--input", source, "--output", tmp_path / "out", code=5)
    assert str(source / "weights") in str(error.value.where)
    assert not (tmp_path / "out").exists()


def test_two_pairs_of_heads_are_ambiguous() -> None:
    names = heads_of().state_dict()
    keys = [prefix + name for prefix in ("module.adapter.", "module.ema.") for name in names]
    with pytest.raises(WeightsError, match=r"twice, at 'module\.adapter\.' and 'module\.ema\.'"):
        head_keys(keys, Path("here"))
    moments = [f"chained_0.optimizer.state.fp32_param.module.adapter.{name}" for name in names]
    assert set(head_keys([*keys[:8], *moments], Path("here"))) == set(names)


def test_one_of_several_checkpoints_must_be_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("step=10", "step=20-last", "step=30"):
        nemo(run / "checkpoints" / name, heads_of().state_dict())
    for source in (run, run / "checkpoints"):
        with pytest.raises(UsageError, match="3 checkpoints") as error:
            export("--input", source, "--output", tmp_path / "out", code=2)
        assert "step=20-last" in str(error.value.fix)
    assert weights_directory(run) is None


def test_a_directory_that_is_not_there_is_said_to_be_not_there(tmp_path: Path) -> None:
    command = ["export", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "h")]
    error = CliRunner().invoke(cli, command).exception
    assert isinstance(error, WeightsError) and "no such checkpoint" in str(error)
    assert str(tmp_path / "none") in str(error)
    assert not (tmp_path / "h").exists()
