"""`autodeco plan`: parameters against transformers, sums over ranks, refusals, the command."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core import parallel_state
from transformers import AutoConfig, AutoModelForCausalLM

from autodeco.cli import cli
from autodeco.engines.megatron.landing import Ledger, tensor_names
from autodeco.engines.megatron.layouts import find_layouts, reason_of
from autodeco.engines.megatron.loading import Place
from autodeco.engines.megatron.memory import META, Allocations
from autodeco.engines.megatron.plan import (
    GIB,
    LayoutPlan,
    Request,
    plan_layout,
    sketch_layout,
)
from autodeco.errors import EnvironmentProblem, UsageError, WeightsError
from autodeco.layout import ParallelLayout
from autodeco_plugin_qwen3.family import FAMILY


@pytest.fixture(autouse=True)
def _no_groups() -> Iterator[None]:
    """Other tests of this process leave groups of one rank behind."""
    if dist.is_initialized():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    yield
    assert not dist.is_initialized()


def request_of(preset: str, gpus: int, memory: float = 80, **changes: Any) -> Request:
    chosen = FAMILY.preset(preset)
    architecture = FAMILY.architecture(chosen.architecture)
    names = [name for rule in FAMILY.weight_map.expand(chosen.shape) for name in rule.sources]
    values: dict[str, Any] = {
        "architecture": architecture,
        "config": architecture.config_json(chosen.shape),
        "bound": FAMILY.weight_map.bind(chosen.shape, names),
        "gpus": gpus,
        "gpu_memory": round(memory * GIB),
        "reserve": 0,
        "micro_batch_tokens": 256,
        "max_length": 256,
    }
    return Request(**{**values, **changes})


def planned(preset: str, layout: str, gpus: int) -> LayoutPlan:
    return plan_layout(request_of(preset, gpus), ParallelLayout.parse(layout))


def transformers_sizes(preset: str) -> dict[str, int]:
    """Elements of each of transformers' parameters; experts are fused there."""
    shape = FAMILY.preset(preset).shape
    values = FAMILY.architecture(FAMILY.preset(preset).architecture).config_json(shape)
    values.pop("architectures")
    with torch.device("meta"):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("preset", "layout", "gpus"),
    [
        ("debug", "tp=1", 1),
        ("debug", "tp=2", 2),
        ("debug", "pp=3", 3),
        ("debug", "tp=2,pp=3", 12),
        ("debug-moe", "tp=1", 2),
        ("debug-moe", "ep=4", 4),
        ("debug-moe", "tp=2", 2),
        ("debug-moe", "tp=2,pp=2,ep=2", 8),
        ("0.6b", "tp=8", 8),
        ("0.6b", "tp=2,pp=2,first=15", 4),
    ],
)
def test_parameters_are_those_of_transformers(preset: str, layout: str, gpus: int) -> None:
    plan = planned(preset, layout, gpus)
    sizes, spread = transformers_sizes(preset), ParallelLayout.parse(layout)
    assert plan.landing is not None
    assert plan.landing.elements == sum(sizes.values())

    whole = {n: s for n, s in sizes.items() if n.endswith(("norm.weight", "mlp.gate.weight"))}
    experts = {n: s for n, s in sizes.items() if ".experts." in n}
    split = sum(sizes.values()) - sum(whole.values()) - sum(experts.values())
    if FAMILY.preset(preset).shape.tied_embeddings and spread.pipeline > 1:
        split += sizes["model.embed_tokens.weight"]
    held = sum(len(rank.ranks) * rank.parameters for rank in plan.ranks)
    stage = gpus // spread.pipeline
    spread_experts = spread.expert * spread.expert_tensor
    assert held == (
        split * stage // spread.tensor
        + sum(whole.values()) * stage
        + sum(experts.values()) * stage // spread_experts
    )


def test_ranks_that_are_alike_are_named_together() -> None:
    plan = planned("debug", "tp=2,pp=3", 12)
    assert len(plan.ranks) == 6
    assert {len(rank.ranks) for rank in plan.ranks} == {2}
    assert sorted(n for rank in plan.ranks for n in rank.ranks) == list(range(12))
    assert [rank.layers for rank in plan.ranks[::2]] == [(0, 0), (1, 1), (2, 2)]
    assert plan.ranks[0].embedding and not plan.ranks[0].output and plan.ranks[-1].output
    assert plan.data_ranks == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "ep=2", "pp=2", "cp=2"])
def test_every_kind_of_parallelism_has_memory(layout: str, dtype: torch.dtype) -> None:
    request = request_of("debug-moe", 2, dtype=dtype)
    plan = sketch_layout(request, ParallelLayout.parse(layout))
    for rank in plan.ranks:
        memory = rank.memory
        assert memory.weights >= rank.parameters * dtype.itemsize
        assert memory.forward > 0 and memory.heads > 0
        assert (memory.objective > 0) == rank.output
        assert (memory.pipeline > 0) == (layout == "pp=2")
    longer = replace(request, micro_batch_tokens=2048, max_length=2048)
    assert sketch_layout(longer, plan.layout).largest.memory.peak > plan.largest.memory.peak


def test_weights_count_once_where_they_are_shared() -> None:
    [rank] = sketch_layout(request_of("debug", 1), ParallelLayout()).ranks
    assert rank.memory.weights == pytest.approx(2 * rank.parameters, rel=0.05)


def test_allocations_count_what_lives() -> None:
    with Allocations(0.0) as seen:
        first = torch.empty(1024, dtype=torch.float32, device=META)
        second = first + 1
        view = second[:10]
        assert seen.live == 8192
        del second
        assert seen.live == 8192  # the view holds it
        del view
        assert seen.live == 4096
        first.add_(1)
        assert (seen.live, seen.restart(), seen.peak) == (4096, 8192, 4096)
        rows = torch.empty(7, dtype=torch.bool, device=META).nonzero()
        assert rows.shape == (7, 1)
    del first, rows
    assert seen.live == 0


def test_the_device_is_given_back() -> None:
    before = (torch.cuda.current_device, torch.nn.functional.scaled_dot_product_attention)
    sketch_layout(request_of("debug-moe", 1), ParallelLayout())
    after = (torch.cuda.current_device, torch.nn.functional.scaled_dot_product_attention)
    assert torch.empty(1).device.type == "cpu"
    assert after[1] is before[1]
    assert after[0] is before[0] or after[0].__name__ == "_cpu"  # the engine's own cure


@pytest.mark.parametrize(
    ("preset", "layout", "gpus", "says"),
    [
        ("debug", "tp=4", 4, "6 query heads over 4 ranks"),
        ("debug", "pp=2", 2, "3 layers do not fit 2 pipeline stages"),
        ("debug", "tp=2", 3, "does not divide 3 processes"),
        ("debug-moe", "ep=3", 3, "8 experts over 3 ranks"),
    ],
)
def test_impossible_layouts_are_refused(preset: str, layout: str, gpus: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        planned(preset, layout, gpus)


def test_a_process_of_a_group_makes_no_plan() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(EnvironmentProblem, match="a process of its own"):
            sketch_layout(request_of("debug", 1), ParallelLayout())
    finally:
        dist.destroy_process_group()


class TestLanding:
    @staticmethod
    def books(tensor: int) -> tuple[Ledger, Any]:
        """A ledger of `tensor` ranks, and a stage at one of them that was really built."""
        from autodeco.engines.megatron.plan import _Ranks

        layout, request = ParallelLayout(tensor=tensor), request_of("debug", tensor)
        model, _ = _Ranks(request, layout).build((0,))
        return Ledger(request.bound, layout, tensor), model

    @staticmethod
    def place(rank: int, ranks: int) -> Place:
        return Place(rank, ranks, 0, 1, rank, ranks)

    def test_books_balance(self) -> None:
        ledger, model = self.books(2)
        for rank in range(2):
            ledger.enter(model, self.place(rank, 2), 1)
        assert ledger.close().copies == 1

    def test_a_missing_slice(self) -> None:
        ledger, model = self.books(2)
        ledger.enter(model, self.place(0, 2), 1)
        with pytest.raises(WeightsError, match="32768 of 65536 elements land"):
            ledger.close()

    def test_a_slice_too_often(self) -> None:
        ledger, model = self.books(2)
        for rank in (0, 1, 1):
            ledger.enter(model, self.place(rank, 2), 1)
        with pytest.raises(WeightsError, match="slice 1 lands on 2 ranks instead of 1"):
            ledger.close()

    def test_nothing_lands(self) -> None:
        with pytest.raises(WeightsError, match="lands on no rank"):
            self.books(1)[0].close()

    def test_a_parameter_that_the_map_does_not_know(self) -> None:
        ledger, model = self.books(1)
        model.extra = torch.nn.Parameter(torch.empty(3))
        with pytest.raises(WeightsError, match="'extra'"):
            ledger.enter(model, self.place(0, 1), 1)


class TestSearch:
    def test_the_fewest_ranks_come_first(self) -> None:
        found = find_layouts(request_of("debug", 6), 100)
        assert [str(plan.layout) for plan in found.fitting] == ["tp=1", "pp=2,first=2", "tp=2",
                                                                 "pp=3", "tp=2,pp=3"]  # fmt: skip
        assert reason_of(found.fitting[0].layout) == "a rank has the whole model"
        assert any("3 ranks" in refused.reason for refused in found.refused)  # tp=3
        assert found.unseen == 0

    def test_what_does_not_fit_is_refused_with_its_sum(self) -> None:
        found = find_layouts(request_of("debug-moe", 2, memory=1e-4), 3)
        assert not found.fitting
        assert all("GiB" in refused.reason for refused in found.refused)
        by_weights = {str(r.layout): r.reason for r in found.refused}["tp=1"]
        assert by_weights.startswith("weights (0.0 / tp 1 + experts 0.0 / 1) / pp 1")

    def test_the_moment_that_does_not_fit_is_named(self) -> None:
        found = find_layouts(request_of("debug-moe", 1, memory=0.032), 1)
        [refused] = found.refused
        assert "stage 0: weights" in refused.reason and " > 0.03 GiB" in refused.reason


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


BASE = ("--plugin", "qwen3", "--gpus", "2", "--gpu-memory", "80", "--max-length", "256",
        "--micro-batch-tokens", "256")  # fmt: skip


def write_index(path: Path, preset: str, drop: int = 0, extra: tuple[str, ...] = ()) -> Path:
    rules = FAMILY.weight_map.expand(FAMILY.preset(preset).shape)
    names = [name for rule in rules for name in rule.sources][drop:] + list(extra)
    pairs = ",".join(f'"{name}": "a.safetensors"' for name in names)
    path.write_text(f'{{"weight_map": {{{pairs}}}}}')
    return path


class TestCommand:
    def test_json_of_a_layout(self, tmp_path: Path) -> None:
        index = write_index(tmp_path / "index.json", "debug-moe")
        text = invoke(*BASE, "--preset", "debug-moe", "--layout", "ep=2", "--index", str(index),
                      "--json")  # fmt: skip
        got = json.loads(text)
        assert got["fits"] and got["layout"] == "ep=2" and got["dtype"] == "bfloat16"
        assert got["landing"]["tensors"] == len(tensor_names(index))
        assert [rank["ranks"] for rank in got["ranks"]] == [[0], [1]]
        assert got["peak"] == max(rank["peak"] for rank in got["ranks"])
        assert any("NCCL" in line for line in got["not_modelled"])

    def test_text_of_a_layout(self) -> None:
        text = invoke(*BASE, "--preset", "debug", "--layout", "tp=2")
        assert "2 distinct ranks x 1 alike" in text
        assert "emb+0-2+out" in text
        assert "not modelled" in text and "reserve 4 GiB of 80" in text

    def test_search(self) -> None:
        text = invoke(*BASE, "--preset", "debug", "--limit", "1")
        assert "1. tp=1, 2 shares of the data" in text
        got = json.loads(invoke(*BASE, "--preset", "debug", "--limit", "1", "--json"))
        assert [plan["layout"] for plan in got["fitting"]] == ["tp=1"]

    def test_a_config_alone(self, tmp_path: Path) -> None:
        preset = FAMILY.preset("debug")
        config = FAMILY.architecture(preset.architecture).config_json(preset.shape)
        (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
        text = invoke(*BASE, "--model", str(tmp_path), "--layout", "tp=2", "--json")
        assert json.loads(text)["dtype"] == "float32"

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"drop": 1}, "1 tensors are missing"),
            ({"extra": ("other.weight",)}, "neither mapped nor dropped"),
            ({"extra": ("model.norm.weight",)}, "'model.norm.weight' stands there twice"),
        ],
    )
    def test_a_wrong_index(self, tmp_path: Path, change: dict[str, Any], says: str) -> None:
        index = write_index(tmp_path / "index.json", "debug", **change)
        with pytest.raises(WeightsError, match=says):
            invoke(*BASE, "--preset", "debug", "--layout", "tp=1", "--index", str(index))

    def test_no_memory_left(self) -> None:
        with pytest.raises(UsageError, match="leaves nothing"):
            invoke(*BASE, "--preset", "debug", "--reserve", "80")

    def test_without_megatron_core(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "autodeco.engines.megatron.plan")
        monkeypatch.setitem(sys.modules, "megatron.core", None)
        with pytest.raises(EnvironmentProblem, match="not installed") as error:
            invoke(*BASE, "--preset", "debug")
        assert error.value.fix == "pip install 'autodeco[megatron]'"


@pytest.mark.slow
def test_64_ranks_of_the_largest_preset() -> None:
    preset = FAMILY.preset("235b-a22b")
    began = time.monotonic()
    request = request_of("235b-a22b", 64, micro_batch_tokens=16384, max_length=6144)
    plan = plan_layout(request, preset.layout)
    assert time.monotonic() - began < 120
    assert plan.landing is not None and plan.landing.elements == 235_093_634_560
    assert len(plan.ranks) == 64 and plan.fits
    per_stage = {rank.stage: rank.layers for rank in plan.ranks}
    assert per_stage[0] == (0, 17) and per_stage[7] == (84, 93)
    held = sum(rank.parameters for rank in plan.ranks if rank.place.expert == 0)
    assert held == pytest.approx(235.09e9 / 8, rel=0.3)
