"""The examples of a plugin with a storage format of its own, and of one with heads of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.source import open_source
from autodeco.decoding.model import AutoDecoModelForCausalLM
from autodeco.engines.base import TokenBatch
from autodeco.engines.select import build_engine
from autodeco.errors import PluginError, RunError, UsageError, WeightsError
from autodeco.heads.files import load_heads
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.hookspecs import BuiltModel, HeadedModel
from autodeco.job import Job
from autodeco.pipeline import RunSummary, run_job
from autodeco.plugin import FamilyPlugin
from autodeco.registry import Registry
from autodeco.settings import resolve
from autodeco.training.checkpoint import list_checkpoints, load_into

ROOT = Path(__file__).parents[2]
EXAMPLES = {"int8_rows": "own_format", "low_rank": "own_heads"}
STAGES = ("import", "build", "attach", "train", "export", "merge", "evaluate")


@dataclass
class Entry:
    """The entry point of an example that is not installed."""

    name: str

    @property
    def value(self) -> str:
        return f"autodeco_plugin_{self.name}:plugin"

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=f"autodeco-plugin-{self.name}", version="0.1.0")

    def load(self) -> Any:
        return import_module(f"autodeco_plugin_{self.name}").plugin


@pytest.fixture(scope="module", autouse=True)
def _examples() -> Iterator[None]:
    """Their packages can be imported, as if they were installed."""
    paths = [str(ROOT / "examples" / folder / "src") for folder in EXAMPLES.values()]
    sys.path[:0] = paths
    yield
    for path in paths:
        sys.path.remove(path)


def registry() -> Registry:
    return Registry([Entry(name) for name in EXAMPLES])


def run(out: Path, plugin: str, stages: tuple[str, ...] = STAGES, **options: Any) -> RunSummary:
    values = {"plugin": plugin, "preset": "debug", "out": out, "task_samples": 32, **options}
    values |= {"device": "cpu", "max_steps": 2, "evaluate_problems": 2, "max_new_tokens": 4}
    known = registry()
    job = resolve(values, None, known).job
    return run_job(job, registry=known, stages=stages, console=Console(quiet=True))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_entry_point_is_the_one_that_is_written_down(name: str) -> None:
    file = ROOT / "examples" / EXAMPLES[name] / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"]
    assert project["entry-points"]["autodeco.plugins"] == {name: Entry(name).value}
    row = registry().get(name)
    assert row.error is None and row.plugin is not None and row.plugin.family.id == name


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """What the int8 checkpoint stands for, worked out here by numpy."""
    stored = load_file(path / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored[name + "_scale"].numpy()
            product = tensor.numpy().astype(np.float32) * scale[:, None]
            found[name] = torch.from_numpy(product)
        elif not name.endswith("_scale"):
            found[name] = tensor
    return found


def int8_checkpoint(place: Path) -> Path:
    plugin = registry().get("int8_rows").plugin
    assert plugin is not None
    family = plugin.family
    return write_random_checkpoint(family, family.preset("debug"), place / "int8")


@pytest.mark.parametrize("engine", ["hf", "megatron"])
def test_own_format_computes_what_the_dequantized_model_does(engine: str, tmp_path: Path) -> None:
    if engine == "megatron":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    path = int8_checkpoint(tmp_path)
    kinds = {str(t.dtype) for t in load_file(path / "model.safetensors").values()}
    assert kinds == {"torch.int8", "torch.float32"}
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads((path / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "int8_rows"}
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dequantized(path), plain / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids = torch.randint(0, 1024, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    family = registry().get("int8_rows").plugin.family  # type: ignore[union-attr]
    options = {"device": "cpu", "dtype": "float32", "engine": engine}
    job = Job(plugin="int8_rows", preset="debug", model=path, **options)  # type: ignore[arg-type]
    built = build_engine(job, open_source(family, job), family)
    every = torch.ones(40, dtype=torch.bool)
    every[-1] = False
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    batch = TokenBatch(ids, torch.arange(40), bounds, every, torch.zeros(40, dtype=torch.int64))
    (hidden,) = built.hidden_states([batch])
    assert hidden is not None
    logits = hidden.h @ built.output_weight().weight.T
    assert expected.std() > 0.3
    assert float((logits - expected[:-1]).abs().max()) < 5e-5


@pytest.mark.parametrize("engine", ["hf", "megatron"])
def test_own_format_goes_the_whole_way(engine: str, tmp_path: Path) -> None:
    if engine == "megatron":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    summary = run(tmp_path, "int8_rows", engine=engine)
    assert [row[0] for row in summary.rows] == list(STAGES)
    assert json.loads((summary.path / "stages" / "build.json").read_text())["engine"] == engine
    base = load_file(summary.path / "model" / "model.safetensors")
    merged = load_file(summary.path / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    assert all(base[n].dtype == merged[n].dtype and base[n].equal(merged[n]) for n in base)
    assert len(json.loads((summary.path / "evaluation.json").read_text())["settings"]) > 3


def test_own_format_imports_into_megatrons(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from autodeco.convert.stored_reader import StoredReader

    path = int8_checkpoint(tmp_path)
    job = Job(plugin="int8_rows", preset="debug", model=path, device="cpu")
    job = job.replace(import_format="torch_dist", import_dir=tmp_path / "imported")
    hooks = registry().resolve("int8_rows", path, "debug").hooks()
    assert hooks.import_weights(job=job).distributed == tmp_path / "imported"
    name = "model.layers.1.mlp.down_proj.weight"
    with StoredReader(tmp_path / "imported") as reader:
        found = reader.read("decoder.layers.1.mlp.linear_fc2.weight")
    assert torch.equal(found, dequantized(path)[name].bfloat16())


def test_own_format_reads_a_ranks_rows_alone(tmp_path: Path) -> None:
    from autodeco.convert.operations import read_target
    from autodeco.convert.shards import ShardReader

    path = int8_checkpoint(tmp_path)
    family = registry().get("int8_rows").plugin.family  # type: ignore[union-attr]
    weights = open_source(family, Job(plugin="int8_rows", preset="debug", model=path))
    asked: list[int] = []

    class Counting(ShardReader):
        def _read(self, stored: str, info: Any, region: Any) -> torch.Tensor:
            block = super()._read(stored, info, region)
            asked.append(block.numel())
            return block

    values = dequantized(path)
    gate, up = (values[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    rules = {rule.target: rule for rule in weights.weight_map.rules}
    with Counting(path, family.formats) as reader:
        rule = rules["decoder.layers.0.mlp.linear_fc1.weight"]
        half = read_target(rule, weights.shape, reader, 1, 2)
    assert torch.equal(half, torch.cat([gate[80:], up[80:]]))
    assert asked == [80 * 96, 80] * 2


def test_own_format_without_its_plugin_is_refused_by_name(tmp_path: Path) -> None:
    path = int8_checkpoint(tmp_path)
    other = import_module("autodeco_plugin_qwen25").plugin.family
    same = [p for p in other.presets if p.name == "debug"]
    family = registry().get("int8_rows").plugin.family  # type: ignore[union-attr]
    preset = dataclasses.replace(same[0], shape=family.preset("debug").shape)
    other = dataclasses.replace(other, presets=(preset,))
    with pytest.raises(WeightsError, match=r"down_proj\.weight_scale'|stored as I8"):
        open_source(other, Job(plugin="qwen25", preset="debug", model=path))


@pytest.mark.parametrize("heads", ["both", "temperature"])
def test_own_heads_go_the_whole_way(heads: str, tmp_path: Path) -> None:
    """Two steps, a resumed third stage, an export that other code reads, and generated text."""
    first = run(tmp_path, "low_rank", STAGES[:4], heads=heads)
    newest = list_checkpoints(first.path / "checkpoints")[-1]
    trained = load_file(newest / "model.safetensors")
    start = load_file(list_checkpoints(first.path / "checkpoints")[0] / "model.safetensors")
    thin = [name for name in trained if name.endswith((".up", ".down"))]
    assert len(thin) == (4 if heads == "both" else 2)
    assert all(not torch.equal(trained[name], start[name]) for name in thin)

    summary = run(tmp_path, "low_rank", heads=heads, checkpoint="last")
    assert summary.path == first.path
    exported = load_heads(summary.path / "heads")
    assert type(exported.heads) is DecodingHeads and exported.heads.config.intermediate_size == 128
    own = import_module("autodeco_plugin_low_rank.heads").LowRankHeads(64, heads, True, seed=9)
    own.load_state_dict(trained)
    generator = torch.Generator().manual_seed(0)
    h, logits = torch.randn(20, 64, generator=generator), torch.randn(20, 30, generator=generator)
    for ours, theirs in zip(own.predict(h, logits), exported.heads.predict(h, logits), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)

    model = AutoDecoModelForCausalLM.from_pretrained(summary.path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    out = model.generate(ids, do_sample=True, max_new_tokens=6, return_autodeco=True)
    assert out.sequences.shape[1] > 4 and out.temperature.std() > 0
    assert bool((out.top_p == 1).all()) == (heads == "temperature")


def test_bug_checkpoints_of_a_plugins_own_heads_were_read_as_ours(tmp_path: Path) -> None:
    """A run whose later checkpoints are lost goes on; those of other heads are refused."""
    options = {"heads": "temperature", "save_every": 1, "keep": 9}
    made = run(tmp_path, "low_rank", STAGES[:4], **options)
    paths = list_checkpoints(made.path / "checkpoints")
    whole = load_file(paths[-1] / "model.safetensors")
    for gone in paths[2:]:
        shutil.rmtree(gone)
    (made.path / "stages" / "train.json").unlink()
    again = run(tmp_path, "low_rank", STAGES[:4], **options)
    newest = list_checkpoints(again.path / "checkpoints")[-1]
    assert newest == paths[-1] and len(paths) == 3
    resumed = load_file(newest / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    with pytest.raises(WeightsError, match="of other heads than the job asks for"):
        load_into(DecodingHeads(HeadsConfig(64, "temperature")), newest)
    with pytest.raises(RunError, match="no checkpoint '77'"):
        run(tmp_path, "low_rank", ("export",), checkpoint="77", **options)
    assert not (made.path / "heads").exists()


def test_own_heads_refuse_heads_to_start_from() -> None:
    hooks = registry().resolve("low_rank", None, "debug").hooks()
    with pytest.raises(UsageError, match="begin from a random draw"):
        hooks.attach_heads(job=Job(init_heads=Path("heads")), model=None)


class Wider(FamilyPlugin):
    """Heads of the usual kind, with another hidden width: one hook, no class."""

    def attach_heads(self, job: Job, model: BuiltModel) -> HeadedModel:
        config = HeadsConfig(model.hidden_size, job.heads, job.enhanced_features, 48)
        heads = DecodingHeads(config, torch.Generator().manual_seed(job.seed))
        return HeadedModel(model, heads.to(model.device))


class Unfit(DecodingHeads):
    """Heads of the usual names that mean something else."""

    def temperature(self, h: torch.Tensor) -> torch.Tensor:
        return super().temperature(h) * 2


def of_class(out: Path, kind: type[FamilyPlugin], stages: tuple[str, ...]) -> RunSummary:
    family = import_module("autodeco_plugin_qwen3").plugin.family
    entry = SimpleNamespace(name="qwen3", value="x:plugin", dist=None, load=lambda: kind(family))
    known = Registry([entry])
    values = {"plugin": "qwen3", "preset": "debug", "out": out, "task_samples": 16, "max_steps": 1}
    job = resolve({**values, "device": "cpu"}, None, known).job
    return run_job(job, registry=known, stages=stages, console=Console(quiet=True))


def test_another_width_needs_one_hook_and_no_class(tmp_path: Path) -> None:
    summary = of_class(tmp_path, Wider, STAGES[:6])
    assert load_heads(summary.path / "heads").heads.config.intermediate_size == 48
    assert load_heads(summary.path / "merged").heads.config.intermediate_size == 48


def test_bug_heads_that_a_heads_directory_cannot_say_were_exported_as_others(
    tmp_path: Path,
) -> None:
    hooks = Registry().resolve("qwen3", None, "debug").hooks()
    heads = Unfit(HeadsConfig(64))
    model = HeadedModel(BuiltModel(None, SimpleNamespace()), heads)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="the heads are Unfit, and a heads directory holds"):
        hooks.export_heads(job=Job(), model=model, path=tmp_path / "heads")
    assert not (tmp_path / "heads").exists()
