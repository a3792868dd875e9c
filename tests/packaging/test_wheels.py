"""The wheels hold what they should and work without the source tree; no file names a machine."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FAMILIES = tuple(sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()))
PLUGINS = {f"autodeco_plugin_{family}": ROOT / "plugins" / family for family in FAMILIES}
DISTS = {"autodeco": ROOT / "core", **PLUGINS}
DEMO = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
# written so that this file does not contain what it looks for
INDEX = "|".join(("py" + "pi", "files.python" + "hosted", "index-" + "url", "simple" + "/$"))
ABSOLUTE = (
    r"(?<![\w.:~-])/(" + "|".join(("wo" + "rk", "ho" + "me", "ro" + "ot", "Us" + "ers")) + r")\b"
)
ADDRESS = r"(?<![\d.])(?!127\.0\.0\.1|0\.0\.0\.0)\d{1,3}(\.\d{1,3}){3}(?![\d.])"


def run(*command: Any, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def project(dist: str) -> dict[str, Any]:
    """The [project] table of a distribution's pyproject.toml."""
    text = (DISTS[dist] / "pyproject.toml").read_text()
    return dict(tomllib.loads(text)["project"])


def version(dist: str) -> str:
    if dist == "autodeco":
        text = (ROOT / "core" / "src" / "autodeco" / "__init__.py").read_text()
        return str(re.findall(r'__version__ = "(.+)"', text)[0])
    return str(project(dist)["version"])


def names_and_versions(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def test_the_five_families_are_here() -> None:
    assert FAMILIES == ("deepseek_v3", "gpt_oss", "llama31", "qwen25", "qwen3")


@pytest.mark.parametrize("dist", list(PLUGINS))
def test_versions_are_in_lock_step_and_fit_the_range_of_core(dist: str) -> None:
    core = Version(version("autodeco"))
    assert version(dist) == str(core)
    (needed,) = map(Requirement, project(dist)["dependencies"])
    assert needed.name == "autodeco" and core in needed.specifier
    bounds = {clause.operator: Version(clause.version) for clause in needed.specifier}
    assert set(bounds) == {">=", "<"}, f"{needed} has no lower and upper bound"
    assert bounds[">="] == Version(f"{core.major}.{core.minor}"), "the newest release of core"
    assert bounds["<"] == Version(f"{core.major}.{core.minor + 1}"), "and none with another api"


@pytest.mark.parametrize("dist", list(PLUGINS))
def test_the_api_of_a_plugin_is_that_of_core(dist: str) -> None:
    from autodeco.family import API
    from autodeco.registry import Registry

    assert Registry().get(dist.removeprefix("autodeco_plugin_")).plugin.family.api == API


@pytest.mark.parametrize("dist", list(PLUGINS))
def test_names_follow_from_the_family(dist: str) -> None:
    described, family = project(dist), DISTS[dist].name
    assert described["name"] == dist.replace("_", "-")
    assert described["entry-points"]["autodeco.plugins"] == {family: f"{dist}:plugin"}


def test_the_lowest_versions_are_the_declared_bounds() -> None:
    """But torch's: the CPU build of its bound cannot be had where CI runs (docs/releasing.md)."""
    core = project("autodeco")
    needs = [*core["dependencies"], *core["optional-dependencies"]["megatron"]]
    lowest = names_and_versions("requirements/lowest.txt")
    for need in map(Requirement, needs):
        (bound,) = (c.version for c in need.specifier if c.operator == ">=")
        assert need.specifier.contains(lowest[need.name]), need
        if need.name != "torch":
            assert Version(lowest[need.name]) == Version(bound), need


def test_the_versions_of_ci_are_in_the_ranges() -> None:
    core = project("autodeco")
    needs = [*core["dependencies"], *core["optional-dependencies"]["megatron"]]
    constraints = names_and_versions("constraints.txt")
    for need in map(Requirement, needs):
        assert need.specifier.contains(constraints[need.name]), need


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All wheels, each built from the source distribution that is built first."""
    out = tmp_path_factory.mktemp("dist")
    for source in DISTS.values():
        options = ("--no-isolation", "--outdir", out)
        run(sys.executable, "-m", "build", "-q", *options, source, cwd=out)
    found = {path.name.split("-")[0]: path for path in out.glob("*.whl")}
    assert set(found) == set(DISTS)
    return found


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def info(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{file}"))
        return archive.read(name).decode()


def metadata(wheel: Path) -> Message:
    return email.message_from_string(info(wheel, "METADATA"))


@pytest.mark.slow
@pytest.mark.parametrize("dist", list(DISTS))
def test_wheel_holds_the_package_and_nothing_else(dist: str, wheels: dict[str, Path]) -> None:
    held, source = names(wheels[dist]), DISTS[dist] / "src"
    own = {name for name in held if ".dist-info/" not in name}
    listed = run("git", "ls-files", "-coz", "--exclude-standard", source, cwd=ROOT).split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    assert own == {str(file.relative_to(source)) for file in files}
    assert f"{dist}/py.typed" in own
    assert {name.split("/")[0] for name in own} == {dist}, "one top-level name: no tests, no tools"


@pytest.mark.slow
@pytest.mark.parametrize("dist", list(DISTS))
def test_bug_wheels_came_without_the_license(dist: str, wheels: dict[str, Path]) -> None:
    assert info(wheels[dist], "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert metadata(wheels[dist])["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_indexes_would_take_what_is_built(wheels: dict[str, Path]) -> None:
    files = sorted({file for wheel in wheels.values() for file in wheel.parent.glob("*.*")})
    assert len(files) == 2 * len(DISTS)
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("dist", list(PLUGINS))
def test_plugin_wheel_holds_the_demo_checkpoint(dist: str, wheels: dict[str, Path]) -> None:
    assert {f"{dist}/demo/{name}" for name in DEMO} <= names(wheels[dist])
    with zipfile.ZipFile(wheels[dist]) as archive:
        sizes = [i.file_size for i in archive.infolist() if "/demo/" in i.filename]
    assert sum(sizes) <= 2 * 2**20, "the demo model has at most 2 MB, its tokenizer included"


@pytest.mark.slow
@pytest.mark.parametrize("dist", list(DISTS))
def test_metadata_and_entry_points(dist: str, wheels: dict[str, Path]) -> None:
    said, points = metadata(wheels[dist]), info(wheels[dist], "entry_points.txt")
    assert said["Version"] == version("autodeco")
    assert said["Requires-Python"] == ">=3.11"
    needs = [need for need in said.get_all("Requires-Dist") or () if "extra ==" not in need]
    if dist == "autodeco":
        assert "autodeco = autodeco.cli:main" in points
        listed = " ".join(needs)
        assert "torch>=2.11" in listed and "transformers<6,>=5.17" in listed
        assert "megatron" not in listed and "plugin" not in listed
    else:
        family = dist.removeprefix("autodeco_plugin_")
        assert f"[autodeco.plugins]\n{family} = {dist}:plugin" in points
        assert [Requirement(need).name for need in needs] == ["autodeco"]


@pytest.mark.slow
def test_wheels_work_in_a_fresh_environment(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Dependencies are lent by this environment; our own packages come from the wheels alone."""
    import torch

    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    run(*pip, "--no-deps", "--no-index", *wheels.values(), cwd=tmp_path)
    (packages,) = (place / "lib").glob("python*/site-packages")
    # A path in a .pth file is searched, but .pth files there are not read: no editable install.
    (packages / "lent.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    code = f"import {', '.join(DISTS)}\nfor m in {', '.join(DISTS)}: print(m.__file__)"
    files = run(python, "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(packages) for file in files), files

    autodeco = place / "bin" / "autodeco"
    assert version("autodeco") in run(autodeco, "--version", cwd=tmp_path)
    rows = json.loads(run(autodeco, "plugin", "list", "--json", cwd=tmp_path))
    found = [(row["id"], row["dist"], row["error"]) for row in rows]
    expected = [(name, f"autodeco-plugin-{name}".replace("_", "-"), None) for name in FAMILIES]
    assert found == expected
    # the built-in checkpoint is found inside the installed wheel, and read
    for family in FAMILIES:
        options = ("--plugin", family, "--json", "--out", tmp_path / "runs")
        told = json.loads(run(autodeco, "import", *options, cwd=tmp_path, HF_HUB_OFFLINE="1"))
        manifest = json.loads((Path(told["run"]) / "stages" / "import.json").read_text())
        assert Path(manifest["path"]).is_relative_to(packages)


def tracked_files() -> list[Path]:
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return tracked_files()


@pytest.mark.parametrize(
    ("what", "pattern"),
    [("a package index", INDEX), ("an absolute path", ABSOLUTE), ("an address", ADDRESS)],
    ids=lambda value: value.replace(" ", "-") if value.startswith("a") else "",
)
def test_no_file_names_a_machine(what: str, pattern: str, tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        if path.suffix == ".safetensors":
            continue
        # what NeMo wrote (tests/nemo) is binary, and has no such thing in it either
        text = path.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line, re.IGNORECASE):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == [], f"{what} stands in"


def test_no_lock_file_is_tracked(tracked: list[Path]) -> None:
    lock = re.compile(r"(\.lock|-lock\.(json|yaml)|^pylock.*\.toml|^requirements.*\.txt)$")
    assert [path.name for path in tracked if lock.search(path.name)] == []


def test_nothing_that_a_build_or_a_run_leaves_is_tracked(tracked: list[Path]) -> None:
    left = {"__pycache__", "dist", "build", ".venv", "runs", ".scratch"}
    found = [p for p in tracked if left.intersection(p.relative_to(ROOT).parts)]
    assert found == []
    assert [p for p in tracked if p.suffix in (".whl", ".partial", ".pyc", ".bin", ".pkl")] == []


@pytest.mark.parametrize(
    ("pattern", "bad", "good"),
    [
        (INDEX, "see https://" + "py" + "pi.org/x", "a file of types"),
        (ABSOLUTE, "open('/" + "ho" + "me/me/x')", "see docs/" + "wo" + "rk or a/" + "ho" + "me"),
        (ADDRESS, "at 10." + "0.0.7:80", "version 6.0.12.20261113, 1.2.3"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: str, bad: str, good: str) -> None:
    assert re.search(pattern, bad, re.IGNORECASE) and not re.search(pattern, good, re.IGNORECASE)
