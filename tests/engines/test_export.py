"""`export --target hf`: what was imported comes back, byte by byte, of all families, resumably."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from torch_dist_made import forge
from transformers import AutoModelForCausalLM

from autodeco.cli import cli
from autodeco.convert import exporting, stored_models, working_directory
from autodeco.convert.adapter_heads import read_adapter_heads
from autodeco.convert.direct_reader import DirectReader
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.shard_writer import ShardWriter
from autodeco.convert.shards import ShardReader
from autodeco.convert.stored import read_manifest
from autodeco.convert.stored_models import open_stored_model
from autodeco.errors import EnvironmentProblem, RunError, UsageError, WeightsError
from autodeco.family import FamilySpec
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.lock import file_lock
from autodeco.safetensors_header import INDEX, read_checkpoint

CASES = (
    ("qwen3", "debug"),
    ("qwen3", "debug-moe"),
    ("qwen25", "debug"),
    ("llama31", "debug"),
    ("gpt_oss", "debug"),
    ("deepseek_v3", "debug"),
)
# family, preset, ranks, layout, TE names, rows of padding
SAVED = (
    pytest.param("qwen3", "debug", 1, "tp=1", False, 0, marks=pytest.mark.slow),
    ("qwen3", "debug-moe", 2, "ep=2", True, 0),
    pytest.param("llama31", "debug", 2, "tp=2", False, 0, marks=pytest.mark.slow),
    pytest.param("qwen25", "debug", 1, "tp=1", False, 24, marks=pytest.mark.slow),
    pytest.param("gpt_oss", "debug", 2, "ep=2", True, 0, marks=pytest.mark.slow),
    ("deepseek_v3", "debug", 1, "tp=1", True, 56),
)
WORKER = Path(__file__).with_name("nemo_worker.py")
LIMIT = 200_000  # bytes: several files


def family_of(name: str) -> FamilySpec:
    found: FamilySpec = import_module(f"autodeco_plugin_{name}.family").FAMILY
    return found


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(name: str, model: Path, output: Path) -> None:
    """The tensors of `output` are those of `model`, decoded, and no others."""
    with DirectReader(model, family_of(name).formats) as source, DirectReader(output) as made:
        assert source.tensors.keys() == made.tensors.keys()
        for tensor in source.tensors:
            expected, found = source.read(tensor), made.read(tensor)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), tensor
            assert raw(found) == raw(expected), tensor


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints and their imports."""
    place: Path = tmp_path_factory.mktemp("export")
    for name, preset in CASES:
        family = family_of(name)
        model = write_random_checkpoint(family, family.preset(preset), place / f"{name}-{preset}")
        command = ["import", "--plugin", name, "--preset", preset, "--format", "torch_dist"]
        run(*command, "--model", model, "--output", place / f"{name}-{preset}-imported")
    return place


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_every_family_comes_back(root: Path, tmp_path: Path, name: str, preset: str) -> None:
    model, output = root / f"{name}-{preset}", tmp_path / "out"
    source = root / f"{name}-{preset}-imported"
    command = ("export", "--target", "hf", "--plugin", name, "--preset", preset)
    run(*command, "--input", source, "--output", output, "--model", model)
    assert_same(name, model, output)
    before, after = (json.loads((d / "config.json").read_text()) for d in (model, output))
    if before.pop("quantization_config", None) is not None:
        for config in (before, after):
            kinds = {config.pop(key) for key in ("dtype", "torch_dtype") if key in config}
            assert config is before or kinds == {"bfloat16"}
    assert before == after
    assert {p.name for p in output.iterdir()} - {p.name for p in model.iterdir()} <= {
        "export.json",
        "model.safetensors",
    }
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("name", "preset"), [("qwen3", "debug-moe"), ("deepseek_v3", "debug")])
def test_without_the_manifest_the_keys_tell(
    root: Path, tmp_path: Path, name: str, preset: str
) -> None:
    model = root / f"{name}-{preset}"
    shutil.copytree(root / f"{name}-{preset}-imported" / "weights", tmp_path / "in" / "weights")
    command = ("export", "--target", "hf", "--model", model, "--output", tmp_path / "out")
    said = json.loads(run(*command, "--plugin", name, "--input", tmp_path / "in", "--json"))
    assert said["written"] is True
    assert_same(name, model, tmp_path / "out")


def test_transformers_loads_it_with_the_same_logits(root: Path, tmp_path: Path) -> None:
    model, output = root / "qwen3-debug-moe", tmp_path / "out"
    stored = open_stored_model(
        family_of("qwen3"), "debug-moe", root / "qwen3-debug-moe-imported", model, limit=LIMIT
    )
    with stored.backbone:
        exporting.export_checkpoint(stored.backbone, stored.plan, model, output)
    index = json.loads((output / INDEX).read_text())
    infos = read_checkpoint(output)
    count = len(set(index["weight_map"].values()))
    assert count > 3
    assert index["metadata"]["total_size"] == sum(info.size for info in infos.values())
    assert set(index["weight_map"].values()) == {
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    }
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        mine, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (output, model)
        )
    assert torch.equal(mine, theirs)


# ---- NeMo's own way of saving


def heads_of(width: int) -> DecodingHeads:
    return DecodingHeads(HeadsConfig(width))


@pytest.mark.parametrize(("name", "preset", "world", "layout", "te", "padding"), SAVED, ids=str)
def test_what_megatron_core_saves_comes_back(
    root: Path, tmp_path: Path, name: str, preset: str, world: int, layout: str, te: bool,
    padding: int,
) -> None:  # fmt: skip
    """In float32, as the engine holds it: FP8 and MXFP4 are decoded, and not rounded."""
    model, source = root / f"{name}-{preset}", tmp_path / "run-last"
    heads = heads_of(family_of(name).preset(preset).shape.hidden_size)
    save_file(heads.state_dict(), tmp_path / "heads.safetensors")
    (source / "weights").mkdir(parents=True)
    (source / "context").mkdir()
    parts = read_manifest(root / f"{name}-{preset}-imported").parts if te else ()
    pieces = (written.piece for part in parts for written in part.pieces)
    names = {piece.key: piece.aliases[0] for piece in pieces if piece.aliases}
    assert bool(names) == te
    save(
        tmp_path, world, family=name, preset=preset, layout=layout, names=names, padding=padding,
        model=model, output=source / "weights",
    )  # fmt: skip
    command = ("export", "--target", "hf", "--plugin", name, "--model", model)
    run(*command, "--input", source, "--output", tmp_path / "out")
    formats = family_of(name).formats
    with ShardReader(model, formats) as before, ShardReader(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for tensor in before.tensors:
            assert torch.equal(after.read(tensor), before.read(tensor).float()), tensor
    found, _ = read_adapter_heads(source / "weights")
    for key, tensor in heads.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)


def save(place: Path, world: int, **options: Any) -> None:
    options |= {"meeting": place / "meeting", "heads": place / "heads.safetensors"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, json.dumps(options, default=str)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [p.returncode for p in processes] == [0] * world, errors[0][-3000:]


# ---- what goes wrong


def export(root: Path, output: Path, name: str = "qwen3-debug", **changes: Any) -> bool:
    values = {"source": root / f"{name}-imported", "limit": LIMIT, **changes}
    family, preset = family_of(name.split("-")[0]), name.split("-", 1)[1]
    stored = open_stored_model(family, preset, values["source"], root / name, limit=values["limit"])
    with stored.backbone:
        return exporting.export_checkpoint(stored.backbone, stored.plan, root / name, output)


def test_a_killed_export_goes_on_where_it_stopped(root: Path, tmp_path: Path) -> None:
    """The process ends at once in the middle of the third file."""
    program = (
        "import os, signal, sys\n"
        "sys.path[:0] = sys.argv[1], os.path.dirname(sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_export\n"
        "from autodeco.convert.shard_writer import ShardWriter\n"
        "plain, asked = ShardWriter.write, []\n"
        "def write(self, name, at, buffer):\n"
        "    if self.path.name.startswith('model-00003'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(self, name, at, buffer)\n"
        "ShardWriter.write = write\n"
        "test_export.export(Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(root), str(output)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    building = tmp_path / ".out.export" / "result"
    assert not output.exists()
    first = sorted(building.glob("model-*"))
    assert [p.name[:11] for p in first] == ["model-00001", "model-00002"]
    times = [p.stat().st_mtime_ns for p in first]
    assert list(building.glob(".*.partial"))
    assert export(root, output) is True
    assert [p.stat().st_mtime_ns for p in sorted(output.glob("model-*"))[:2]] == times
    assert_same("qwen3", root / "qwen3-debug", output)
    assert not building.exists()
    assert not list(output.glob(".*"))
    assert export(root, output) is False  # it is there


def test_another_plan_begins_again(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    output = tmp_path / "out"
    plain = working_directory.publish
    monkeypatch.setattr(working_directory, "publish", _full_disk)
    with pytest.raises(EnvironmentProblem):
        export(root, output)
    monkeypatch.setattr(working_directory, "publish", plain)
    assert export(root, output, limit=2 * LIMIT) is True
    assert_same("qwen3", root / "qwen3-debug", output)


def _full_disk(*_: Any) -> None:
    raise EnvironmentProblem("the disk is full")


def test_a_full_disk_leaves_whole_files_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[..., None] = ShardWriter.write

    def write(self: ShardWriter, name: str, at: int, buffer: Any) -> None:
        if self.path.name.startswith("model-00002"):
            _full_disk()
        plain(self, name, at, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write)
        with pytest.raises(EnvironmentProblem):
            export(root, tmp_path / "out")
    written = (tmp_path / ".out.export" / "result").glob("*model-*")
    assert [p.name[:11] for p in written] == ["model-00001"]
    assert export(root, tmp_path / "out") is True
    assert_same("qwen3", root / "qwen3-debug", tmp_path / "out")


def test_room_is_asked_for_before_the_first_byte(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentProblem, match="the exported checkpoint needs"):
        export(root, tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_two_exports_do_not_meet(root: Path, tmp_path: Path) -> None:
    lock = file_lock(tmp_path / ".out.lock", "the export", tmp_path, "wait")
    with pytest.raises(RunError, match="in use"):
        export(root, tmp_path / "out")
    lock.remove()
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(root, tmp_path / "out")


def keyed(root: Path, place: Path, edit: Callable[[dict[str, Any], dict[Any, Any]], None]) -> Path:
    """Weights without a manifest, with other metadata."""
    shutil.copytree(root / "qwen3-debug-moe-imported" / "weights", place / "weights")
    for metadata in forge(place / "weights"):
        edit(metadata.state_dict_metadata, metadata.storage_data)
    return place


def _rename(old: str, new: str) -> Callable[[dict[str, Any], dict[Any, Any]], None]:
    def edit(tensors: dict[str, Any], places: dict[Any, Any]) -> None:
        for key in [k for k in tensors if k.startswith(old)]:
            tensors[new + key.removeprefix(old)] = tensors.pop(key)
        for index in [i for i in places if i.fqn.startswith(old)]:
            moved = type(index)(new + index.fqn.removeprefix(old), index.offset)
            places[moved] = places.pop(index)

    return edit


def test_the_prefix_may_be_missing(root: Path, tmp_path: Path) -> None:
    source = keyed(root, tmp_path / "in", _rename("module.", ""))
    assert export(root, tmp_path / "out", "qwen3-debug-moe", source=source) is True
    assert_same("qwen3", root / "qwen3-debug-moe", tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, p: t.pop("module.decoder.final_layernorm.weight"), "there is no 'module.decod"),
        (_rename("module.decoder.final_layernorm.weight", "module.other"), "there is no 'module"),
        (
            lambda t, p: t.update({"module.surplus.weight": next(iter(t.values()))}),
            "belong to nothing in the weight map, the first is 'module.surplus",
        ),
        (
            lambda t, p: setattr(
                t["module.decoder.final_layernorm.weight"], "size", torch.Size([7])
            ),
            "has the shape",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    root: Path, tmp_path: Path, edit: Any, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        export(root, tmp_path / "out", "qwen3-debug-moe", source=keyed(root, tmp_path, edit))
    assert not list(tmp_path.glob(".out*"))


def test_what_is_dropped_is_listed(root: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    source = root / "deepseek_v3-debug-imported"
    shutil.copy(root / "deepseek_v3-debug" / "config.json", model)
    family, args = family_of("deepseek_v3"), ("debug", source, model)
    layers = family.preset("debug").shape.num_layers
    (pattern,) = open_stored_model(family, *args).plan.dropped
    assert pattern == rf"model\.layers\.{layers}\..*"
    extra = f"model.layers.{layers}.eh_proj.weight"
    index = {"metadata": {}, "weight_map": {extra: "x", "lm_head.weight": "x"}}
    (model / INDEX).write_text(json.dumps(index))
    dropped = open_stored_model(family, *args).plan.dropped
    assert set(dropped) == {extra}
    assert "multi-token" in dropped[extra]


def test_the_config_comes_from_the_import_or_the_user(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "imported"
    shutil.copytree(root / "qwen3-debug-imported", source)
    shutil.rmtree(source / "hf", ignore_errors=True)
    with pytest.raises(UsageError, match=r"no config\.json"):
        stored_models.model_directory(source, None)
    small = source / "hf"
    small.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "qwen3-debug" / name, small)
    run("export", "--target", "hf", "--input", source, "--output", tmp_path / "out")
    assert_same("qwen3", root / "qwen3-debug", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    run("export", "--target", "hf", "--input", source / "weights", "--output", tmp_path / "two")
    assert_same("qwen3", root / "qwen3-debug", tmp_path / "two")


def test_another_preset_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do not agree"):
        export(root, tmp_path / "out", source=root / "qwen3-debug-moe-imported")
