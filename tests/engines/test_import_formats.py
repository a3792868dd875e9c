"""Importing FP8 blocks and MXFP4: decoded and rounded once, and the engine computes the same."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron_worker import logits, samples

from autodeco.cli import main
from autodeco.convert.importing import ready_weights
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.source import open_source
from autodeco.convert.stored import read_manifest, verify
from autodeco.engines.hf import HFEngine
from autodeco.engines.select import build_engine
from autodeco.family import FamilySpec
from autodeco.job import Job
from autodeco.training.batching import pack

CPU = torch.device("cpu")
LAYERS = "module.decoder.layers"
QUANTIZED = ("gpt_oss", "deepseek_v3")


def family_of(name: str) -> FamilySpec:
    found: FamilySpec = import_module(f"autodeco_plugin_{name}.family").FAMILY
    return found


def source(name: str, preset: str, place: Path) -> Path:
    """The trained demo model, or a random one."""
    family = family_of(name)
    if preset == "demo":
        return Path(str(import_module(f"autodeco_plugin_{name}").__file__)).parent / "demo"
    return write_random_checkpoint(family, family.preset(preset), place / f"{name}-{preset}")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo models, imported by the command line."""
    place = tmp_path_factory.mktemp("imported")
    for name in QUANTIZED:
        command = ["import", "--plugin", name, "--preset", "demo", "--format", "torch_dist"]
        model = source(name, "demo", place)
        main([*command, "--model", str(model), "--output", str(place / name)])
    return {name: place / name for name in QUANTIZED}


def stored(directory: Path, *keys: str) -> dict[str, torch.Tensor]:
    """Whole tensors, read by torch's own reader of the format."""
    reader = dcp.FileSystemReader(directory / "weights")
    entries: Any = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(entries[k].size, dtype=entries[k].properties.dtype) for k in keys}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def transformers_model(name: str) -> dict[str, torch.Tensor]:
    """What transformers has in bfloat16: see `tests/core/test_formats.py` for whose values."""
    path = source(name, "demo", Path())
    job = Job(plugin=name, model=path, preset="demo")
    dropped = open_source(family_of(name), job).weight_map.dropped
    model: dict[str, torch.Tensor] = HFEngine(
        path, CPU, torch.bfloat16, dropped=dropped
    ).model.state_dict()
    return model


def test_mxfp4_experts_are_written_as_bfloat16(imported: dict[str, Path]) -> None:
    first, second = (f"{LAYERS}.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
    found, model = stored(imported["gpt_oss"], first, second), transformers_model("gpt_oss")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    for layer in range(4):
        experts = f"model.layers.{layer}.mlp.experts."
        for expert in range(8):
            rows = model[experts + "gate_up_proj"][expert].T
            assert torch.equal(found[first][layer, expert], torch.cat([rows[0::2], rows[1::2]]))
            down = model[experts + "down_proj"][expert].T
            assert torch.equal(found[second][layer, expert], down)


def test_fp8_blocks_are_rounded_once_and_the_routers_bias_stays_float32(
    imported: dict[str, Path],
) -> None:
    keys = [f"{LAYERS}.0.mlp.linear_fc1.weight"]
    for layer in range(1, 4):
        experts = f"{LAYERS}.{layer}.mlp.experts.experts."
        keys += [experts + "linear_fc1.weight", experts + "linear_fc2.weight"]
        keys += [f"{LAYERS}.{layer}.self_attention.linear_q_up_proj.weight"]
        keys += [f"{LAYERS}.{layer}.mlp.router.expert_bias"]
    found, model = stored(imported["deepseek_v3"], *keys), transformers_model("deepseek_v3")
    dense = [model[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(found[keys[0]], torch.cat(dense))
    for layer in range(1, 4):
        block = f"model.layers.{layer}."
        first, second, attention, bias = (found[k] for k in keys[4 * layer - 3 : 4 * layer + 1])
        assert torch.equal(first, model[block + "mlp.experts.gate_up_proj"])
        assert torch.equal(second, model[block + "mlp.experts.down_proj"])
        assert torch.equal(attention, model[block + "self_attn.q_b_proj.weight"])
        assert {t.dtype for t in (first, second, attention)} == {torch.bfloat16}
        assert bias.dtype == torch.float32
        assert torch.equal(bias, model[block + "mlp.gate.e_score_correction_bias"])
        assert not torch.equal(bias, bias.bfloat16().float())  # rounding it would show


def test_norms_of_latent_attention_have_the_names_of_transformer_engine_as_well(
    imported: dict[str, Path],
) -> None:
    pairs = {
        f"{LAYERS}.0.pre_mlp_layernorm.weight": f"{LAYERS}.0.mlp.linear_fc1.layer_norm_weight",
    }
    for kind in ("q", "kv"):
        block = f"{LAYERS}.2.self_attention."
        pairs[f"{block}{kind}_layernorm.weight"] = f"{block}linear_{kind}_up_proj.layer_norm_weight"
    found = stored(imported["deepseek_v3"], *pairs, *pairs.values())
    assert all(torch.equal(found[ours], found[theirs]) for ours, theirs in pairs.items())
    names = dcp.FileSystemReader(imported["deepseek_v3"] / "weights").read_metadata()
    assert f"{LAYERS}.1.mlp.linear_fc1.layer_norm_weight" not in names.state_dict_metadata


@pytest.mark.parametrize("preset", ["demo", "debug"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_an_imported_checkpoint_computes_what_the_source_does(
    name: str, preset: str, tmp_path: Path
) -> None:
    family, model = family_of(name), source(name, preset, tmp_path)
    job = Job(
        plugin=name,
        preset=preset,
        model=model,
        device="cpu",
        dtype="bfloat16",
        engine="megatron",
        import_format="torch_dist",
        import_dir=tmp_path / "imported",
    )
    weights = ready_weights(family, job)
    assert weights.distributed == tmp_path / "imported"
    verify(weights.distributed, read_manifest(weights.distributed))
    manifest = json.loads((weights.distributed / "import.json").read_text())
    kinds = {p["dtype"] for part in manifest["parts"] for p in part["pieces"]}
    plain = name == "gpt_oss" and preset == "demo"  # the debug models' other tensors are float32
    assert kinds == ({"bfloat16"} if plain else {"bfloat16", "float32"})
    straight = open_source(family, job.replace(import_format="hf"))
    batches = [pack(samples(3, family.preset(preset).shape.vocab_size, 5).samples)]
    results = []
    for source_of in (straight, weights):
        engine = build_engine(job, source_of, family)
        results.append(logits(engine, batches))
        del engine
    assert len(results[0]) > 20 and results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
