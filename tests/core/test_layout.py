"""Layouts: how they are written, and that an impossible one is refused with the arithmetic."""

from __future__ import annotations

import dataclasses

import pytest

from autodeco.engines.select import choose_engine
from autodeco.errors import EnvironmentProblem, PluginError, UsageError
from autodeco.family import ParallelLayout
from autodeco.job import Job
from autodeco_plugin_qwen3.family import FAMILY

BIG = FAMILY.preset("235b-a22b")
SMALL = FAMILY.preset("8b")


def test_a_layout_is_read_and_written() -> None:
    text = "tp=2,pp=8,ep=8,cp=4,first=18,last=10"
    layout = ParallelLayout.parse(text)
    assert layout == ParallelLayout(2, 8, 8, 4, 18, 10)
    assert ParallelLayout.parse(str(layout)) == layout
    assert ParallelLayout.parse("") == ParallelLayout.parse(" tp=1 , pp=1") == ParallelLayout()
    assert str(ParallelLayout()) == "tp=1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpp=2", "unknown key 'tpp'.*did you mean 'tp'"),
        ("tp", "'tp' is no positive whole number"),
        ("tp=0", "'tp=0' is no positive whole number"),
        ("tp=two", "no positive whole number"),
        ("pp=2,pp=4", "pp is given twice"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){said}"):
        ParallelLayout.parse(text)


def test_the_published_layouts_fit_64_processes() -> None:
    assert BIG.layout.data_ranks(BIG.shape, 64) == 8
    assert BIG.layout.stage_layers(94) == (18, 11, 11, 11, 11, 11, 11, 10)
    moe = FAMILY.preset("30b-a3b")
    assert moe.layout.data_ranks(moe.shape, 64) == 64


@pytest.mark.parametrize(
    ("preset", "text", "ranks", "said"),
    [
        ("8b", "tp=3", 3, ["32 query heads over 3 ranks", "8 key and value heads over 3 ranks"]),
        ("8b", "tp=16", 16, ["8 key and value heads over 16 ranks"]),
        ("8b", "tp=2,pp=2", 6, ["tp 2 x pp 2 x cp 1 = 4 does not divide 6 processes"]),
        ("8b", "pp=5", 5, ["36 layers do not fit 5 pipeline stages"]),
        ("8b", "pp=2,first=40", 2, ["36 layers do not fit 2 pipeline stages", "-4 layers"]),
        ("8b", "pp=4,first=35", 4, ["1 layers over 3 stages"]),
        ("8b", "ep=2", 2, ["ep=2, and the model has no experts"]),
        ("235b-a22b", "ep=3,pp=2", 6, ["128 experts over 3 ranks"]),
        ("235b-a22b", "ep=8,pp=2", 8, ["ep=8 does not divide the 4 ranks of a pipeline stage"]),
    ],
)
def test_an_impossible_layout_is_refused_with_the_arithmetic(
    preset: str, text: str, ranks: int, said: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        ParallelLayout.parse(text).data_ranks(FAMILY.preset(preset).shape, ranks)
    for part in said:
        assert part in str(error.value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as error:
        ParallelLayout.parse("tp=3,pp=5,ep=2").data_ranks(SMALL.shape, 7)
    assert all(part in str(error.value) for part in ("query heads", "7 processes", "no experts"))


def test_experts_are_split_or_spread() -> None:
    assert ParallelLayout.parse("tp=2").expert_tensor == 2
    assert ParallelLayout.parse("tp=2,ep=2").expert_tensor == 1


def test_one_process_has_the_whole_model_and_several_the_presets_layout() -> None:
    pytest.importorskip("megatron.core")
    assert choose_engine(Job(), BIG, 1) == ("hf", ParallelLayout())
    assert choose_engine(Job(), BIG, 64) == ("megatron", BIG.layout)
    assert choose_engine(Job(), SMALL, 4) == ("hf", SMALL.layout)
    assert choose_engine(Job(layout="tp=2"), SMALL, 4)[0] == "megatron"
    assert choose_engine(Job(engine="megatron"), SMALL, 1)[0] == "megatron"
    with pytest.raises(UsageError, match="does not divide 6 processes"):
        choose_engine(Job(), BIG, 6)
    with pytest.raises(UsageError, match="whole model in each process"):
        choose_engine(Job(engine="hf", layout="tp=2"), SMALL, 2)


def test_without_megatron_core_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autodeco.engines.select.has_megatron", lambda: False)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'autodeco\[megatron\]'"):
        choose_engine(Job(layout="pp=2"), SMALL, 2)
    assert choose_engine(Job(), SMALL, 2)[0] == "hf"


def test_no_stage_may_be_empty() -> None:
    with pytest.raises(PluginError, match="0 layers over 1 stages"):
        dataclasses.replace(ParallelLayout(pipeline=2), first_stage_layers=3).stage_layers(3)
