"""The two families that strangers would add: short, complete, and right on both engines."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from packages import ROOT, install, run

EXAMPLES = ("mixtral", "olmo2")


def files(name: str) -> list[Path]:
    tracked = (ROOT / "examples" / name).rglob("*")
    left = {"__pycache__", ".ruff_cache", "dist"}
    return [p for p in tracked if p.is_file() and not left.intersection(p.parts)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_at_most_120_lines_in_all(name: str) -> None:
    counts = {path.name: len(path.read_text().splitlines()) for path in files(name)}
    assert {"pyproject.toml", "family.py", "weights.py", f"test_{name}.py"} <= set(counts)
    assert sum(counts.values()) <= 120, counts
    assert "TODO(author)" not in "".join(path.read_text() for path in files(name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_formatted_at_100_columns(name: str) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    place = ROOT / "examples" / name
    run(ruff, "format", "--check", "--no-cache", "--line-length", 100, place, cwd=ROOT)
    run(ruff, "check", "--no-cache", "--select", "E,F,I,UP", place, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fulfils_its_contract(name: str, tmp_path: Path) -> None:
    """Its own test, on the installed wheel: every check, TP=2, PP=2 and EP=2 among them."""
    target = install(ROOT / "examples" / name, tmp_path)
    tests = shutil.copytree(ROOT / "examples" / name / "tests", tmp_path / "tests")
    told = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests),
        cwd=tmp_path,
        PYTHONPATH=str(target),
    )
    assert "passed" in told and "failed" not in told


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_the_whole_way_on_its_random_model(name: str, tmp_path: Path) -> None:
    target = install(ROOT / "examples" / name, tmp_path)
    options = ("--out", tmp_path / "runs", "--device", "cpu", "--evaluate-problems", 2, "--json")
    told = run(
        *(sys.executable, "-m", "autodeco", "run", "--plugin", name, *options),
        cwd=tmp_path,
        PYTHONPATH=str(target),
    )
    place = Path(json.loads(told)["run"])
    assert (place / "heads" / "model.safetensors").is_file()
    assert (place / "merged" / "config.json").is_file()
