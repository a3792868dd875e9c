"""Checkpoints: whole or not at all, the right ones kept and found, torn ones passed over aloud."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training_tools import outcome, run_training, tiny_heads, tiny_job

from autodeco.errors import AutodecoError, EnvironmentProblem, RunError, WeightsError
from autodeco.heads.files import load_heads
from autodeco.training import checkpoint as module
from autodeco.training.checkpoint import (
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_state,
    remove_old,
    save_checkpoint,
    step_of,
)


def state(step: int, best: int = 0) -> TrainingState:
    return TrainingState(step, 4 * step, step, 9, 0, "0123", best, 1.5, {"loss": 1.5})


def save(folder: Path, step: int, best: int = 0) -> Path:
    heads = tiny_heads(seed=step)
    moments = {"a.exp_avg": torch.full((2,), float(step))}
    return save_checkpoint(folder, "tiny", heads, moments, state(step, best), {"objective": "nll"})


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def emptied(path: Path) -> None:
    (path / "state.json").write_bytes(b"")


def without_optimizer(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def without_state(path: Path) -> None:
    (path / "state.json").unlink()


def flipped(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # one bit, in a tensor's data: the file is still well-formed
    file.write_bytes(data)


def flipped_optimizer(path: Path) -> None:
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)


def edited_state(path: Path) -> None:
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "best_loss": 0.0}))


def list_for_state(path: Path) -> None:
    (path / "state.json").write_text("[1, 2]")


def binary_state(path: Path) -> None:
    (path / "state.json").write_bytes(b"\xff\xfe\x00")


def all_empty(path: Path) -> None:
    for file in path.iterdir():  # a filesystem that lost the blocks in a power cut
        file.write_bytes(b"")


def emptied_directory(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


TEARS: list[Callable[[Path], None]] = [
    truncated,
    emptied,
    without_optimizer,
    without_state,
    flipped,
    flipped_optimizer,
    edited_state,
    list_for_state,
    binary_state,
    all_empty,
    emptied_directory,
]


@pytest.mark.parametrize("tear", TEARS, ids=lambda tear: tear.__name__)
def test_a_torn_newest_checkpoint_is_passed_over_aloud(
    tmp_path: Path, tear: Callable[[Path], None]
) -> None:
    job = tiny_job(drop=0.3, save_every=1, keep=3)
    run_training(tmp_path / "whole", job)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    folder = tmp_path / "cut" / "checkpoints"
    before = list_checkpoints(folder)
    tear(before[-1])
    with pytest.raises(WeightsError) as torn:
        load_state(before[-1])
    assert "--checkpoint STEP" in str(torn.value) and before[-1].name in str(torn.value)
    screen = io.StringIO()
    run_training(
        tmp_path / "cut", job, heads=tiny_heads(seed=5), console=Console(file=screen, width=300)
    )
    said = screen.getvalue()
    assert f"checkpoint {before[-1].name} cannot be used" in said
    assert "trying the one before" in said and "resumed at step 9/10" in said
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert (folder / f"{before[-1].name}.torn").is_dir()  # kept for who wants to look


def test_several_torn_checkpoints_and_then_all(tmp_path: Path) -> None:
    job = tiny_job(save_every=1, keep=3)
    run_training(tmp_path / "whole", job)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "cut") / "checkpoints"
    for path in list_checkpoints(folder)[-2:]:
        truncated(path)
    screen = io.StringIO()
    run_training(tmp_path / "cut", job, console=Console(file=screen, width=300))
    assert screen.getvalue().count("cannot be used") == 2
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    for path in list_checkpoints(folder):
        emptied(path)
    screen = io.StringIO()
    run_training(tmp_path / "cut", job, console=Console(file=screen, width=300))
    assert "training starts again" in screen.getvalue()
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 3, best=2)
    assert path.name == "tiny-3-12"
    tensors, moments, loaded = load_checkpoint(path)
    assert loaded == state(3, best=2) == load_state(path)
    assert all(torch.equal(v, tensors[k]) for k, v in tiny_heads(seed=3).state_dict().items())
    assert moments["a.exp_avg"].tolist() == [3.0, 3.0]
    assert load_heads(path).metadata["objective"] == "nll"
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "config.json",
        "state.json",
    }


def test_a_checkpoint_appears_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    seen = []
    original = module.atomic_write_json

    def full(path: Path, value: object) -> None:
        seen.append(steps(tmp_path))
        original(path, value)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "atomic_write_json", full)
    with pytest.raises(EnvironmentProblem, match="free some space"):
        save(tmp_path, 2)
    assert seen == [[1]] and steps(tmp_path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-1-4"]
    load_checkpoint(tmp_path / "tiny-1-4")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 2)
    again = save_checkpoint(tmp_path, "tiny", tiny_heads(seed=9), {}, state(2), {})
    tensors, moments, _ = load_checkpoint(again)
    assert moments == {} and steps(tmp_path) == [2]
    assert all(torch.equal(v, tensors[k]) for k, v in tiny_heads(seed=9).state_dict().items())
    assert not list(tmp_path.glob(".*"))


def test_a_replacement_that_fails_at_the_end_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    original = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if Path(target).name == "tiny-2-8" and (self / "state.json").exists():
            content = json.loads((self / "state.json").read_text())
            if content["best_step"] == 1:  # the new one
                raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(EnvironmentProblem):
        save(tmp_path, 2, best=1)
    monkeypatch.undo()
    assert load_state(tmp_path / "tiny-2-8").best_step == 0
    assert not list(tmp_path.glob(".*"))


def test_order_is_by_number_and_foreign_names_do_not_count(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "notes").mkdir()
    (tmp_path / "tiny-99-1.torn").mkdir()
    (tmp_path / ".tiny-98-1.abc.partial").mkdir()
    (tmp_path / "tiny-97-1").write_text("a file")
    assert steps(tmp_path) == [2, 9, 10]
    assert step_of(tmp_path / "a-b-7-3-12") == 3 and step_of(tmp_path / "notes") == -1
    found = load_newest(tmp_path, lambda text: pytest.fail(text))
    assert found is not None and found[2].step == 10


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, 1, [1, 4, 5]),
        (2, 4, [4, 5]),
        (1, 3, [3, 5]),
        (0, 5, [5]),
        (9, 0, [1, 2, 3, 4, 5]),
        (1, 77, [5]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int, left: list[int]
) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    removed = remove_old(tmp_path, keep, best)
    assert steps(tmp_path) == left
    assert sorted(step_of(p) for p in removed) == sorted({1, 2, 3, 4, 5} - set(left))
    assert not list(tmp_path.glob(".*"))


def test_without_held_out_samples_the_first_checkpoint_is_not_kept_as_the_best(
    tmp_path: Path,
) -> None:
    run_training(tmp_path, tiny_job(save_every=1, keep=2), held_out=0)
    assert steps(tmp_path / "checkpoints") == [9, 10]


def test_the_checkpoint_that_is_asked_for_is_found(tmp_path: Path) -> None:
    for step in (0, 3, 6, 12):
        save(tmp_path, step, best=min(step, 6))
    for which, step in {"last": 12, "best": 6, "0": 0, "3": 3, "012": 12}.items():
        assert step_of(find_checkpoint(tmp_path, which)) == step
    for wrong in ("5", "first", "-3", "", "3.0", "tiny-3-12"):
        with pytest.raises(RunError) as error:
            find_checkpoint(tmp_path, wrong)
        assert "best, last or one of: 0, 3, 6, 12" in str(error.value)
        assert str(tmp_path) in str(error.value)


def test_a_best_checkpoint_that_is_gone_is_an_error_that_says_its_step(tmp_path: Path) -> None:
    save(tmp_path, 4, best=2)
    with pytest.raises(RunError, match=r"no checkpoint 'best' \(step 2\)"):
        find_checkpoint(tmp_path, "best")
    with pytest.raises(RunError, match="one of: none"):
        find_checkpoint(tmp_path / "empty", "last")


def test_a_torn_checkpoint_is_not_exported_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, best=1)
    flipped(tmp_path / "tiny-1-4")
    assert step_of(find_checkpoint(tmp_path, "last")) == 2
    for which in ("best", "1"):
        with pytest.raises(AutodecoError) as error:
            find_checkpoint(tmp_path, which)
        assert isinstance(error.value, WeightsError) and "--checkpoint STEP" in str(error.value)
        assert "tiny-1-4" in str(error.value)
