"""Bad input of every kind: the documented exit code, a message with a cure, nothing damaged."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_cases import CASES
from bad_inputs import Case, World

from autodeco import errors
from autodeco.cli import main
from autodeco.lock import run_lock

SOURCES = Path(errors.__file__).parent


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a tiny random model; every test works on copies of its parts."""
    out = tmp_path_factory.mktemp("pristine")
    options = ["--plugin", "qwen3", "--preset", "debug", "--task-samples", "16", "--max-steps", "1"]
    for stage in ("train", "export"):
        main([stage, *options, "--out", str(out)])
    (run,) = (out / "qwen3-debug").iterdir()
    return run


@pytest.fixture
def world(tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, pristine)
    monkeypatch.setattr(sys, "path", [str(made.modules), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return made


def fails(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    return stopped.value.code, capsys.readouterr().err


def test_the_world_is_good_before_it_is_spoiled(world: World) -> None:
    main(list(map(str, ["train", *world.run()[1:]])))
    assert list(world.out.glob("*/*/checkpoints/*-1-*"))


def test_there_are_enough_kinds() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(case: Case, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = case.prepare(world)
    before, run_before = world.digests(), sorted(world.pristine.rglob("*"))
    code, said = fails(arguments, capsys)
    assert code == case.code, said
    places = {n: getattr(world, n) for n in ("root", "model", "data", "problems", "out")}
    for part in case.said:
        assert part.format(**places) in said, said
    cure = "\n  do: " in said or "Try 'autodeco" in said  # the latter is click's
    assert cure, f"the message does not say what to do:\n{said}"
    assert "Traceback" not in said and "defect" not in said
    assert world.digests() == before, "an input was changed"
    assert sorted(world.pristine.rglob("*")) == run_before, "another run was changed"
    assert not list(world.root.rglob("*.partial"))
    assert world.out.exists() == case.begins
    assert not list(world.out.glob("*/*/merged")) and not list(world.out.glob("*/*/report.html"))


# --- the machine


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path | None]]:
    """Mounts a small filesystem of its own; None where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(options: str) -> Path | None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except OSError:
            return None
        return place if done.returncode == 0 else None

    yield mounted
    while place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_no_space_loses_nothing_and_the_same_command_finishes(
    world: World,
    mount: Callable[..., Path | None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = mount("size=128k")  # enough for job.json, not for a checkpoint
    world.out = (disk or world.root) / "out"
    before = world.digests()
    with monkeypatch.context() as patch:
        if disk is None:
            patch.setattr(os, "fsync", fail_with(errno.ENOSPC))
        code, said = fails([*world.run(), "--merge", "none"], capsys)
    assert code == 7 and "No space left on device" in said and "free some space" in said
    assert str(world.out) in said and "Traceback" not in said
    assert not list(world.out.rglob("*.partial"))
    if disk is not None:
        assert list(world.out.glob("*/*/job.json")), "the run had begun"
        remount(disk, "size=32m")
    again = [*map(str, world.run()), "--merge", "none", "--evaluate-problems", "1"]
    main([*again, "--max-new-tokens", "2"])
    (run,) = world.out.glob("*/*/")
    assert (run / "report.html").exists() and (run / "heads" / "config.json").exists()
    assert world.digests() == before


def test_no_space_for_a_merged_checkpoint(
    world: World,
    mount: Callable[..., Path | None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = mount("size=128k")
    if disk is None:
        monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    target = (disk or world.root) / "merged"
    heads = world.pristine / "heads"
    command = ["merge", "--model", world.model, "--heads-dir", heads, "--output", target]
    code, said = fails([*command, *(["--copy"] if disk else [])], capsys)
    assert code == 7 and str(target.parent) in said
    assert ("nothing was written" if disk else "No space left on device") in said
    assert list(target.parent.glob("*merged*")) == []


def test_read_only_output(
    world: World,
    mount: Callable[..., Path | None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = mount("size=1m")
    world.out = (disk or world.root) / "out"
    if disk is None:
        monkeypatch.setattr(Path, "mkdir", fail_with(errno.EROFS))
    else:
        remount(disk, "ro")
    code, said = fails(world.run(), capsys)
    assert code == 7 and "Read-only file system" in said and str(world.out) in said
    assert "another directory" in said and not world.out.exists()
    output = (disk or world.root) / "heads"
    arguments = ["export", "--input", world.pristine, "--output", output]
    code, said = fails(arguments, capsys)
    assert code == 7 and "Read-only file system" in said and str(output) in said


def test_device_that_is_not_there(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, said = fails(world.run("--device", "cuda"), capsys)
    assert code == 7 and "CUDA is not available" in said and "--device cpu" in said


def test_tracker_that_is_not_installed(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, said = fails(world.run("--track", "wandb"), capsys)
    assert code == 7 and "wandb" in said and "pip install" in said


def test_run_in_use(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    main(list(map(str, ["import", *world.run()[1:]])))
    (run,) = world.out.glob("*/*/")
    lock = run_lock(run)
    try:
        code, said = fails(world.run(), capsys)
    finally:
        lock.release()
    assert code == 6 and f"process {os.getpid()}" in said and "--resume new" in said


def test_a_broken_plugin_is_listed_and_harms_no_other(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    world.install("bad-exit", "bad", "raise SystemExit(3)\n")
    world.install("bad-markup", "worse", "raise ValueError('[/b]')\n")
    main(["plugin", "list"])
    shown = capsys.readouterr().out
    assert "SystemExit" in shown and "[/b]" in shown and "autodeco-plugin-qwen3" in shown
    main(["plugin", "show", "qwen3"])


# --- every message


def test_every_error_says_what_to_do() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    # an early end is no error: its message says to run the same command again
    kinds -= {"AutodecoError", "ClassVar", "StoppedEarly", "Interrupted"}
    calls = [
        (path.relative_to(SOURCES), node)
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds
    ]
    assert len(calls) > 50
    mute = [
        f"{path}:{call.lineno}"
        for path, call in calls
        if not {"fix", None} & {keyword.arg for keyword in call.keywords}
    ]
    assert mute == []
