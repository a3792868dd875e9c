"""A cast is the source, decoded in float32 and rounded once; stock transformers loads it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from format_tools import QUANTIZED, demo, family_of, random_fp8, random_mxfp4, same_bf16
from safetensors.torch import load_file, save_file

from autodeco.cli import cli
from autodeco.convert import casting
from autodeco.convert.cast_plan import plan_cast
from autodeco.convert.casting import cast_checkpoint
from autodeco.convert.formats import decode_fp8_blocks, decode_mxfp4
from autodeco.convert.source import open_source
from autodeco.engines.hf import HFEngine
from autodeco.errors import EnvironmentProblem, RunError, UsageError, WeightsError
from autodeco.job import Job
from autodeco.lock import file_lock

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8"},
}


def write(directory: Path, shards: dict[str, dict[str, torch.Tensor]], **config: Any) -> Path:
    directory.mkdir(parents=True)
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if len(shards) > 1:
        table = {name: file for file, tensors in shards.items() for name in tensors}
        index = {"metadata": {}, "weight_map": table}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def source(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """FP8 with partial blocks, a scale in another file than its weight, MXFP4, and plain ones."""
    one, two = random_fp8(300, 259, dtype), random_fp8(130, 64, dtype, seed=1)
    mx = random_mxfp4((3, 64, 10))
    path = write(
        directory,
        {
            "model-00001-of-00003.safetensors": {
                "a.weight": one["weight"],
                "b.weight": two["weight"],
                "b.weight_scale_inv": two["scale"],
                "norm": torch.arange(5, dtype=torch.float32) / 3,
                "half": torch.arange(6, dtype=torch.float16).view(2, 3),
            },
            "model-00002-of-00003.safetensors": {
                "e_blocks": mx["blocks"],
                "e_scales": mx["scales"],
                "scalar": torch.tensor(2.5),
            },
            "model-00003-of-00003.safetensors": {"a.weight_scale_inv": one["scale"]},
        },
    )
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("x")
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    (path / "original").mkdir()
    (path / "original" / "model.pth").write_bytes(b"x")
    return path


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_a_cast_is_the_source_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    path = source(tmp_path / "source", dtype)
    plan = cast_checkpoint(path, tmp_path / "out", workers=3)
    assert (plan.decoded, plan.count) == (3, 6)
    found = tensors_of(tmp_path / "out")
    fp8 = {"a.weight": random_fp8(300, 259, dtype), "b.weight": random_fp8(130, 64, dtype, seed=1)}
    for name, parts in fp8.items():
        assert same_bf16(found.pop(name), decode_fp8_blocks(parts).bfloat16())
    assert same_bf16(found.pop("e"), decode_mxfp4(random_mxfp4((3, 64, 10))).bfloat16())
    plain = tensors_of(path)
    assert set(found) == {"norm", "half", "scalar"}
    assert all(t.dtype == plain[n].dtype and torch.equal(t, plain[n]) for n, t in found.items())


def test_a_cast_is_complete_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    plan = cast_checkpoint(path, tmp_path / "out")
    out = tmp_path / "out"
    assert plan.left_out == (Path("original/model.pth"),)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config == {"architectures": CONFIG["architectures"], "torch_dtype": "bfloat16"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.name for file in out.glob("*.safetensors") for name in load_file(file)
    }
    sizes = [t.numel() * t.element_size() for t in tensors_of(out).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("family", QUANTIZED)
def test_stock_transformers_loads_a_cast_and_gives_the_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    cast_checkpoint(demo(family), tmp_path / "out")
    cast, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    spec = family_of(family)
    job = Job(plugin=family, preset=spec.presets[0].name, model=demo(family))
    dropped = open_source(spec, job).weight_map.dropped
    engine = HFEngine(demo(family), torch.device("cpu"), torch.bfloat16, dropped=dropped)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(cast(ids).logits, engine.model(ids).logits)


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_a_cast_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    path = source(tmp_path / "source")
    cast_checkpoint(path, tmp_path / "whole")
    real, calls = casting._cast_block, []

    def cut_off(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(casting, "_cast_block", cut_off)
        if stop <= 7:
            with pytest.raises(KeyboardInterrupt):
                cast_checkpoint(path, tmp_path / "out", workers=1)
            assert not (tmp_path / "out").exists()
    written = {
        p: p.stat().st_ino for p in (tmp_path / ".out.cast" / "result").glob("*.safetensors")
    }
    assert not list(tmp_path.glob(".out.cast/result/.*"))
    cast_checkpoint(path, tmp_path / "out")
    assert all((tmp_path / "out" / p.name).stat().st_ino == n for p, n in written.items())
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_a_killed_cast_of_another_source_left_is_not_used(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    building = tmp_path / ".out.cast" / "result"
    cast_checkpoint(path, tmp_path / "one")
    shutil.copytree(tmp_path / "one", building)
    (building.parent / "plan.json").write_text('{"source": "of another"}')
    shard = building / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    cast_checkpoint(path, tmp_path / "out")
    assert (tmp_path / "out" / shard.name).read_bytes() == (
        tmp_path / "one" / shard.name
    ).read_bytes()


def test_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    cast_checkpoint(path, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    cast_checkpoint(path, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    other = source(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 1}))
    with pytest.raises(UsageError, match="the output exists already"):
        cast_checkpoint(other, tmp_path / "out")


def test_two_casts_to_one_place_are_kept_apart(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    lock = file_lock(tmp_path / ".out.lock", "the cast", tmp_path / "out", "wait")
    with pytest.raises(RunError):
        cast_checkpoint(path, tmp_path / "out")
    lock.remove()


FP8 = random_fp8(128, 128, torch.float32)
MX = random_mxfp4((1, 32, 2))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"w": FP8["weight"]}, "'w' is stored as fp8_blocks (F8_E4M3), and its scale"),
        ({"w_scale_inv": FP8["scale"]}, "'w_scale_inv' is a scale of fp8_blocks, and 'w' is missi"),
        (
            {"w": torch.zeros(128, 128), "w_scale_inv": FP8["scale"]},
            "'w_scale_inv' is a scale of fp8_blocks, and 'w' is not stored so",
        ),
        (
            {"w": FP8["weight"], "w_scale_inv": torch.ones(2, 1)},
            "tensor 'w': scale has the shape (2, 1), expected (1, 1)",
        ),
        (
            {"w": FP8["weight"], "w_scale_inv": torch.ones(1, 1, dtype=torch.float64)},
            "'w_scale_inv' is F64",
        ),
        ({"w": torch.ones(4).to(torch.float8_e5m2)}, "'w' is F8_E5M2, and no storage format"),
        ({"w": torch.ones(4, dtype=torch.int8)}, "'w' is I8, and no storage format"),
        ({"e_blocks": MX["blocks"]}, "'e_blocks' is U8, and no storage format"),
        (
            {"e_blocks": MX["blocks"], "e_scales": torch.ones(1, 3, 1, dtype=torch.uint8)},
            "tensor 'e': scales has the shape (1, 3, 1), expected (1, 2, 1)",
        ),
    ],
)
def test_what_cannot_be_cast_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], says: str
) -> None:
    good = {"good": FP8["weight"].clone(), "good_scale_inv": FP8["scale"].clone()}
    path = write(tmp_path / "source", {"model.safetensors": {**good, **tensors}})
    with pytest.raises(WeightsError) as error:
        cast_checkpoint(path, tmp_path / "out")
    assert says in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_plain_checkpoint_needs_no_cast(tmp_path: Path) -> None:
    path = write(tmp_path / "source", {"model.safetensors": {"w": torch.ones(2)}})
    with pytest.raises(UsageError, match="there is nothing to cast"):
        plan_cast(path)


def test_a_disk_without_room_is_found_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path / "source")
    usage = type(shutil.disk_usage(tmp_path))(1 << 40, 1 << 40, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentProblem, match="the cast checkpoint needs"):
        cast_checkpoint(path, tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "out").exists()


def test_the_source_is_only_read(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    files = [p for p in path.rglob("*") if p.is_file()]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    for file in files:
        file.chmod(0o444)
    cast_checkpoint(path, tmp_path / "out")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files} == before


def test_the_command_casts_verifies_and_finds_a_flipped_bit(tmp_path: Path) -> None:
    path, out = source(tmp_path / "source"), tmp_path / "out"
    run = CliRunner().invoke
    planned = run(cli, ["cast", "--input", str(path), "--output", str(out), "--dry-run", "--json"])
    assert not out.exists() and json.loads(planned.stdout)["written"] is False
    made = run(cli, ["cast", "--input", str(path), "--output", str(out), "--json"])
    values = json.loads(made.stdout)
    assert values["written_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert values["decoded"] == 3 and values["left_out"] == ["original/model.pth"]
    verify = ["verify", "--input", str(out), "--model", str(path)]
    assert json.loads(run(cli, [*verify, "--json"]).stdout)["tensors"] == 6
    shard = out / "model-00001-of-00003.safetensors"
    with shard.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 64]))
    found = run(cli, verify)
    assert isinstance(found.exception, WeightsError) and "differs at" in str(found.exception)
