"""The support matrix: page, data and the layouts of the tests agree; the rest is announced."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from autodeco import support
from autodeco.layout import ParallelLayout
from autodeco.support import MATRIX, NEVER, RUN, SIMULATED, announce, never_run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "support-matrix.md"
CASES = ROOT / "tests" / "megatron_cases.py"
PROCESSES = {"ALONE": 1, "TWO": 2, "FOUR": 4, "EIGHT": 8}
ON_GPUS = 2  # what tests/gpu/test_nccl.py runs of them


def test_page_agrees_with_the_data() -> None:
    lines = re.findall(r"^\| ((?:hf|megatron) \|.+) \|$", PAGE.read_text(), re.MULTILINE)
    wanted = [" | ".join(row.cells()) for row in MATRIX]
    assert lines == wanted, "the page should have:\n" + "\n".join(f"| {row} |" for row in wanted)


def test_every_layout_that_the_tests_run_is_in_the_matrix() -> None:
    found = 0
    for node in ast.parse(CASES.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            ranks = PROCESSES.get(node.targets[0].id)
            if ranks is None:
                continue
            for _, layout in ast.literal_eval(node.value):
                found += 1
                for device in ("cpu", "cuda") if ranks <= ON_GPUS else ("cpu",):
                    said = never_run("megatron", ParallelLayout.parse(layout), device, ranks=ranks)
                    assert said is None, f"{layout} on {ranks} ranks is run by a test: {said}"
    assert found > 20


def test_rows_that_were_run_are_not_announced_and_have_versions() -> None:
    for row in MATRIX:
        assert row.state in (RUN, SIMULATED, NEVER)
        if row.state == RUN:
            assert row.versions and row.ranks
            layout = ParallelLayout.parse(row.layout)
            options: Any = {"ranks": row.ranks, "versions": row.versions}
            assert never_run(row.engine, layout, row.device, **options) is None


@pytest.mark.parametrize(
    ("engine", "layout", "device", "more", "said"),
    [
        ("hf", "tp=1", "cpu", {}, None),
        ("hf", "tp=1", "cuda", {}, None),
        ("hf", "tp=1", "cuda", {"ranks": 2}, None),
        ("hf", "tp=1", "cuda", {"ranks": 3}, "NCCL with more than 2 GPUs"),
        ("megatron", "pp=2,first=2", "cuda", {"ranks": 2}, None),
        ("megatron", "ep=2", "cuda", {"ranks": 4}, "NCCL with more than 2 GPUs; the megatron"),
        ("megatron", "tp=1", "cuda", {"ranks": 2, "machines": 2}, "us: 2 machines (see"),
        ("hf", "tp=1", "cpu", {"ranks": 8}, "hf engine with tp=1 on cpu, 8 processes"),
        ("hf", "tp=1", "cpu", {"ranks": 2, "machines": 2}, "2 machines"),
        ("megatron", "tp=2,pp=2", "cpu", {"ranks": 8}, None),
        ("megatron", "pp=2,first=2,last=1", "cpu", {"ranks": 2}, None),
        ("megatron", "tp=4", "cpu", {"ranks": 4}, "megatron engine with tp=4 on cpu"),
        ("megatron", "pp=8,ep=8", "cuda", {"ranks": 64, "machines": 8}, "8 machines; NCCL"),
        ("megatron", "tp=1", "cpu", {"transformer_engine": True}, "Transformer Engine"),
        ("hf", "tp=1", "cpu", {"versions": {"torch": "2.99.1"}}, "torch 2.99.1"),
        ("hf", "tp=1", "cpu", {"versions": {"torch": "2.13.7+cpu"}}, None),
    ],
)
def test_what_was_never_run_is_said(
    engine: str, layout: str, device: str, more: Any, said: str | None
) -> None:
    got = never_run(engine, ParallelLayout.parse(layout), device, **more)
    if said is None:
        assert got is None
    else:
        assert got is not None and got.startswith("never run by us: ") and said in got


def test_it_is_announced_once_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(
        name="megatron", layout=ParallelLayout(tensor=16), device=SimpleNamespace(type="cpu")
    )
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")

    def said() -> str:
        console = Console(record=True, quiet=False, width=300)
        announce(engine, console)
        return console.export_text()

    monkeypatch.setenv("RANK", "0")
    assert said().count("never run by us: 2 machines") == 1 and "tp=16" in said()
    monkeypatch.setenv("RANK", "1")
    assert said() == ""


def test_the_range_of_megatron_core_is_that_of_the_extra() -> None:
    text = (ROOT / "core" / "pyproject.toml").read_text()
    assert f'"megatron-core{support.MEGATRON}"' in text
    assert f'requires-python = ">={".".join(map(str, support.PYTHON))}"' in text
