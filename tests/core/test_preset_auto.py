"""``--preset auto``: sizes from the checkpoint's config.json, layout by the processes' memory."""

from __future__ import annotations

import dataclasses
import json
import signal
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rank_runs import Ranks, metrics, only_run, run_well

from autodeco.cli import cli
from autodeco.cluster.join import Cluster
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.source import open_source
from autodeco.engines import fitting
from autodeco.errors import AutodecoError, EnvironmentProblem, PluginError, UsageError, WeightsError
from autodeco.family import FamilySpec, ModelShape
from autodeco.job import Job
from autodeco.plugin import FamilyPlugin
from autodeco.recipes import TRAINING
from autodeco.registry import Registry
from autodeco.settings import resolve
from autodeco.stories import write_records
from autodeco_plugin_llama31.family import FAMILY as LLAMA31
from autodeco_plugin_qwen3.family import FAMILY as QWEN3
from autodeco_plugin_qwen25.family import FAMILY as QWEN25

GIB = 2**30
OWN = ModelShape(2, 48, 4, 2, 16, 80, 2048)  # of no preset


def checkpoint(family: FamilySpec, path: Path, shape: ModelShape = OWN) -> Path:
    """A random checkpoint of a shape that no preset has, with the demo's tokenizer."""
    preset = replace(family.preset("debug"), name="own", shape=shape)
    folder = Path(str(resources.files(family.package) / "demo"))
    write_random_checkpoint(family, preset, path, tokenizer=folder)
    return path


def config_of(family: FamilySpec, path: Path, preset: str = "debug", **changes: Any) -> Path:
    """A directory with a config.json alone; a value of None takes the key out."""
    chosen = family.preset(preset)
    values = family.architecture(chosen.architecture).config_json(chosen.shape, chosen.config)
    values |= changes
    path.mkdir(exist_ok=True)
    kept = {key: value for key, value in values.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
    return path


def told(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def arguments(folder: Path, name: str, model: Path, **more: Any) -> list[str]:
    options = {
        "plugin": "llama31",
        "preset": "auto",
        "model": model,
        "data": folder / "train.jsonl",
        "eval-data": folder / "held_out.jsonl",
        "device": "cpu",
        "max-steps": 6,
        "global-batch": 4,
        "warmup-steps": 1,
        "constant-steps": 0,
        "save-every": 1,
        "dist-timeout": 60,
        "out": folder / name,
        **{key.replace("_", "-"): value for key, value in more.items()},
    }
    return ["run", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]


def write_data(folder: Path) -> None:
    write_records(folder / "train.jsonl", 1, "train", 32)
    write_records(folder / "held_out.jsonl", 1, "heldout", 4)


def test_a_shape_that_no_preset_has_is_an_error_that_names_preset_auto(tmp_path: Path) -> None:
    model = config_of(LLAMA31, tmp_path / "m", num_hidden_layers=5)
    with pytest.raises(PluginError, match="no preset has the checkpoint's shape") as caught:
        Registry().resolve("llama31", model, None)
    assert "--preset auto" in (caught.value.fix or "")


def test_a_preset_of_another_size_is_an_error_that_names_preset_auto(tmp_path: Path) -> None:
    model = config_of(LLAMA31, tmp_path / "m", num_hidden_layers=5)
    with pytest.raises(PluginError, match="num_layers 3 expected, 5 found") as caught:
        Registry().resolve("llama31", model, "debug")
    assert "--preset auto" in (caught.value.fix or "")


@pytest.mark.parametrize("plugin", ["llama31", None])
def test_preset_auto_has_the_sizes_of_the_checkpoint(tmp_path: Path, plugin: str | None) -> None:
    model = config_of(LLAMA31, tmp_path / "m", num_hidden_layers=5)
    found = Registry().resolve(plugin, model, "auto")
    assert (found.family.id, found.preset.name) == ("llama31", "auto")
    assert found.preset.shape == replace(LLAMA31.preset("debug").shape, num_layers=5)
    assert found.preset.recipe == TRAINING
    assert not found.preset.layout.is_parallel


def test_preset_auto_takes_a_shape_that_a_preset_has_too(tmp_path: Path) -> None:
    found = Registry().resolve("qwen3", config_of(QWEN3, tmp_path / "m", "8b"), "auto")
    assert (found.preset.name, found.preset.shape) == ("auto", QWEN3.preset("8b").shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"num_hidden_layers": None}, "has no 'num_hidden_layers'"),
        ({"num_hidden_layers": 0}, "impossible: num_layers 0"),
        ({"hidden_size": -96}, "impossible: hidden_size -96"),
        ({"num_attention_heads": 0, "head_dim": None}, "impossible: num_heads 0"),
        ({"num_key_value_heads": 4}, "6 heads over 4 key and value heads"),
        ({"vocab_size": "1024"}, "no int"),
        ({"architectures": ["Gemma9ForCausalLM"]}, "no architecture 'Gemma9ForCausalLM'"),
        ({"architectures": None}, "no architecture"),
        ({"architectures": []}, "no architecture"),
    ],
)
def test_a_config_that_does_not_fit_stays_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = config_of(LLAMA31, tmp_path / "m", **changes)
    with pytest.raises(PluginError, match=message) as caught:
        Registry().resolve("llama31", model, "auto")
    assert caught.value.fix and str(model / "config.json") in str(caught.value)


def test_experts_that_cannot_be_chosen_are_an_error(tmp_path: Path) -> None:
    model = config_of(QWEN3, tmp_path / "m", "debug-moe", num_experts_per_tok=99)
    with pytest.raises(PluginError, match="99 of 8 experts"):
        Registry().resolve("qwen3", model, "auto")


def test_preset_auto_without_a_model_is_an_error() -> None:
    with pytest.raises(PluginError, match="takes its sizes from a checkpoint") as caught:
        Registry().resolve("llama31", None, "auto")
    assert "--model DIR" in (caught.value.fix or "")


def test_a_plugin_cannot_have_a_preset_called_auto() -> None:
    presets = (*QWEN3.presets, replace(QWEN3.presets[0], name="auto"))
    thing = FamilyPlugin(dataclasses.replace(QWEN3, presets=presets))
    entry = SimpleNamespace(name="qwen3", value="m:plugin", dist=None, load=lambda: thing)
    (row,) = Registry([entry]).rows()
    assert row.plugin is None and "'auto'" in str(row.error)


def test_every_use_of_a_jobs_preset_knows_auto(tmp_path: Path) -> None:
    """The import reads sizes anew from the job's model: a job says no more than its name."""
    model = checkpoint(QWEN25, tmp_path / "m", replace(OWN, tied_embeddings=True))
    job = Job(plugin="qwen25", preset="auto", model=model)
    assert open_source(QWEN25, job).shape == replace(OWN, tied_embeddings=True)
    with pytest.raises(WeightsError, match="does not agree with preset 'debug'"):
        open_source(QWEN25, job.replace(preset="debug"))


def test_a_config_that_does_not_fit_the_tensors_ends_the_import(tmp_path: Path) -> None:
    model = checkpoint(LLAMA31, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(WeightsError, match=r"shape \(80, 48\), expected \(96, 48\)"):
        open_source(LLAMA31, Job(plugin="llama31", preset="auto", model=model))


def test_a_run_goes_the_whole_way_and_is_found_again(tmp_path: Path) -> None:
    write_data(tmp_path)
    model = checkpoint(QWEN25, tmp_path / "m", replace(OWN, tied_embeddings=True))
    words = arguments(tmp_path, "runs", model, plugin="qwen25", max_steps=2)
    first = told(*words, "--json")
    assert first.exit_code == 0, first.output
    run = only_run(tmp_path / "runs")
    assert run.parent.name == "qwen25-auto"
    assert json.loads((run / "job.json").read_text())["preset"] == "auto"
    made = json.loads((run / "stages" / "build.json").read_text())["made"]
    assert made == "engine hf on cpu, float32"
    heads = (run / "heads" / "model.safetensors").read_bytes()
    again = told("run", "--resume", run, "--json")
    assert again.exit_code == 0, again.output
    assert (run / "heads" / "model.safetensors").read_bytes() == heads
    assert [row["step"] for row in metrics(tmp_path / "runs", "train")] == [1, 2], "trained once"


def test_dry_run_says_how_the_layout_comes_about(tmp_path: Path) -> None:
    model = config_of(LLAMA31, tmp_path / "m", num_hidden_layers=5)
    found = resolve({"plugin": "llama31", "model": model, "preset": "auto"}, None, Registry())
    assert "memory" in found.provenance["layout"] and found.job.layout is None
    given = resolve({"preset": "auto", "model": model, "layout": "tp=2"}, None, Registry())
    assert given.provenance["layout"] == "command line"


def fitted(tmp_path: Path, memory: float, ranks: int = 8, **options: Any) -> Any:
    """The layout for `memory` GiB a process, of a 70B model whose layers are fewer."""
    model = config_of(LLAMA31, tmp_path / "m", "70b", num_hidden_layers=16)
    found = Registry().resolve("llama31", model, "auto")
    values = {"dtype": "bfloat16", "micro_batch_tokens": 2048, "max_length": 2048, **options}
    job = Job(model=model, device="cpu", **values)
    return fitting.fitting_layout(job, found.family, found.preset, ranks)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the bytes that each process has."""

    def set_to(size: float) -> None:
        monkeypatch.setattr(fitting, "process_memory", lambda device: round(size * GIB))

    return set_to


@pytest.mark.parametrize(("size", "layout"), [(80, "tp=1"), (24, "pp=2"), (16, "pp=4")])
def test_the_layout_is_the_first_of_plan(
    tmp_path: Path, memory: Any, size: float, layout: str
) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    memory(size)
    assert str(fitted(tmp_path, size)) == layout
    words = ("--gpus", 8, "--gpu-memory", size, "--micro-batch-tokens", 2048)
    words += ("--max-length", 2048, "--dtype", "bfloat16", "--limit", 1, "--json")
    for model in (tmp_path / "m", tmp_path / "m" / "config.json"):
        result = told("plan", "--plugin", "llama31", "--preset", "auto", "--model", model, *words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["fitting"][0]["layout"] == layout


def test_what_fits_nowhere_is_an_error_with_the_arithmetic(tmp_path: Path, memory: Any) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    memory(2)
    with pytest.raises(UsageError, match=r"no layout fits 8 processes of 2.0 GiB.*GiB") as caught:
        fitted(tmp_path, 2)
    assert "more processes" in (caught.value.fix or "")


def test_without_megatron_core_a_model_that_fits_is_not_spread(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "has_megatron", lambda: False)
    memory(80)
    assert str(fitted(tmp_path, 80)) == "tp=1"
    memory(24)
    with pytest.raises(EnvironmentProblem, match="megatron-core is not installed") as caught:
        fitted(tmp_path, 24)
    assert caught.value.fix == "pip install 'autodeco[megatron]'"


def test_an_architecture_that_megatron_does_not_run_is_not_spread(
    tmp_path: Path, memory: Any
) -> None:
    model = config_of(LLAMA31, tmp_path / "m", "70b")
    (architecture,) = LLAMA31.architectures
    other = replace(architecture, no_megatron="a test says so")
    family = replace(LLAMA31, architectures=(other,))
    preset = family.preset_for("auto", json.loads((model / "config.json").read_text()), where="")
    job = Job(model=model, device="cpu", dtype="bfloat16")
    memory(80)
    with pytest.raises(EnvironmentProblem, match=r"does not run .*: a test says so"):
        fitting.fitting_layout(job, family, preset, 2)


@pytest.mark.parametrize(
    ("options", "ranks", "asked"),
    [
        ({"preset": "auto"}, 2, True),
        ({"preset": "auto"}, 1, False),
        ({"preset": "auto", "layout": "tp=2"}, 2, False),
        ({"preset": "auto", "engine": "hf"}, 2, False),
        ({"preset": "auto", "engine": "megatron"}, 2, True),
        ({"preset": "8b"}, 2, False),
    ],
)
def test_only_preset_auto_without_a_layout_asks_for_one(
    tmp_path: Path, options: dict[str, Any], ranks: int, asked: bool
) -> None:
    model = config_of(QWEN3, tmp_path / "m", "8b")
    preset = Registry().resolve("qwen3", model, options["preset"]).preset
    assert fitting.is_to_be_fitted(Job(**options), preset, ranks) is asked


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    whole = fitting.host_memory()
    assert whole > GIB // 4
    assert fitting.process_memory(torch.device("cpu")) == whole // 4


def test_ranks_that_come_to_different_layouts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(0, ("alpha", "beta"))
    monkeypatch.setattr(Cluster, "_gathered", lambda self, value: ["tp=2", "pp=2"])
    with pytest.raises(EnvironmentProblem, match=r"beta: .*is pp=2, that of rank 0 is tp=2"):
        cluster.same_layout("tp=2")


def test_launch_leaves_the_layout_to_the_machines_of_the_job(tmp_path: Path) -> None:
    model = config_of(LLAMA31, tmp_path / "m", num_hidden_layers=5)
    words = ("--plugin", "llama31", "--preset", "auto", "--model", model)
    result = told("launch", "--nodes", 1, "--gpus-per-node", 2, *words)
    assert result.exit_code == 0, result.output
    assert "chosen when the job starts" in result.output and "--preset auto" in result.output


def test_doctor_asks_for_a_layout_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    result = told("doctor", "--distributed", "--plugin", "llama31", "--preset", "auto")
    assert isinstance(result.exception, SystemExit | AutodecoError)
    said = result.output + str(result.exception)
    assert "no checkpoint" in said


# More microbatch than one of two processes has room for: only tensor parallelism makes it fit.
SMALL_MACHINE = """
import os
_sysconf = os.sysconf
os.sysconf = lambda name: 1_900_000 if name == "SC_PHYS_PAGES" else _sysconf(name)
"""


@pytest.mark.slow
def test_two_ranks_split_what_does_not_fit_and_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chosen layout trains as the same one given by hand; one process goes on from it."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    write_data(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "sitecustomize.py").write_text(SMALL_MACHINE)
    model = checkpoint(LLAMA31, tmp_path / "m")
    run_well(arguments(tmp_path, "given", model, layout="tp=2"), 2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "small"))
    words = arguments(tmp_path, "chosen", model)
    with Ranks([*words, "--json"], 2) as ranks:
        found = lambda: any((tmp_path / "chosen").glob("*/*/checkpoints/*-3-*"))  # noqa: E731
        ranks.send_when(found, 1, signal.SIGUSR1)
        ended = ranks.all_ended()
    assert [code for code, _ in ended] == [75, 75], ended
    assert "layout tp=2, by the memory of the processes" in ended[0][1]
    run = only_run(tmp_path / "chosen")
    assert json.loads((run / "job.json").read_text())["layout"] is None
    steps = [row["loss"] for row in metrics(tmp_path / "chosen", "train")]
    whole = [row["loss"] for row in metrics(tmp_path / "given", "train")]
    assert steps == whole[: len(steps)] and len(steps) >= 3
    monkeypatch.delenv("PYTHONPATH")
    run_well(["run", "--resume", str(run)], 1)
    assert only_run(tmp_path / "chosen") == run
    rest = [row["loss"] for row in metrics(tmp_path / "chosen", "train")]
    assert rest == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_import_writes_a_checkpoint_of_the_models_own_sizes(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    model, target = checkpoint(LLAMA31, tmp_path / "m"), tmp_path / "imported"
    words = ("--plugin", "llama31", "--preset", "auto", "--model", model)
    words += ("--format", "torch_dist", "--output", target)
    run_well(["import", *map(str, words)], 1)
    assert (target / "import.json").exists()
