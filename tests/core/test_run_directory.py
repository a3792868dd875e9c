"""Run directories: what is begun, continued, refused and cleared away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autodeco.errors import RunError, UsageError
from autodeco.pipeline import RunSummary, run_job
from autodeco.registry import Registry
from autodeco.settings import resolve

TRAIN = ("import", "build", "attach", "train")
STAGES = (*TRAIN, "export", "merge")


def run(stages: tuple[str, ...] = STAGES, **options: Any) -> RunSummary:
    registry = Registry()
    values = {"plugin": "qwen3", "preset": "debug", "task_samples": 16, "max_steps": 2, **options}
    job = resolve(values, None, registry).job
    return run_job(job, registry=registry, stages=stages, console=Console(quiet=True))


def seconds(summary: RunSummary) -> dict[str, float]:
    return {row[0]: row[2] for row in summary.rows}


def test_bug_a_users_directory_with_a_file_called_lock_was_deleted(tmp_path: Path) -> None:
    kept = tmp_path / "src" / "db"
    kept.mkdir(parents=True)
    (kept / "lock").touch()
    (kept / "precious.txt").write_text("x")
    stamp = tmp_path / "src" / "20260101-000000"
    stamp.mkdir()
    (stamp / "lock").touch()
    (stamp / "notes.txt").write_text("x")
    begun = tmp_path / "src" / "20260101-000001"
    (begun / "stages").mkdir(parents=True)
    (begun / "lock").touch()
    run(("import",), out=tmp_path, name="src")
    assert (kept / "precious.txt").read_text() == (stamp / "notes.txt").read_text() == "x"
    assert not begun.exists(), "an empty run that was killed at its beginning goes"


def test_bug_a_trained_run_took_other_options_and_kept_its_heads(tmp_path: Path) -> None:
    first = run(TRAIN, out=tmp_path)
    before = (first.path / "job.json").read_bytes()
    with pytest.raises(RunError, match="training of this run is done; max_steps cannot change"):
        run(TRAIN, resume=str(first.path), max_steps=3, allow_change="max_steps")
    assert (first.path / "job.json").read_bytes() == before


def test_an_untrained_run_may_change_and_forgets_that_it_might(tmp_path: Path) -> None:
    first = run(TRAIN[:2], out=tmp_path)
    again = run(TRAIN, resume=str(first.path), seed=5, allow_change="seed")
    assert again.path == first.path
    assert json.loads((first.path / "job.json").read_text())["allow_change"] == ""


@pytest.mark.parametrize("resume", ["auto", "new"])
def test_bug_allow_change_was_ignored_without_a_path(tmp_path: Path, resume: str) -> None:
    with pytest.raises(UsageError, match="only together with --resume PATH"):
        run(TRAIN, out=tmp_path, resume=resume, allow_change="seed")


def test_bug_a_runs_own_job_worked_from_its_first_directory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = run(TRAIN[:1], out=Path("a")).path
    shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "data.jsonl").write_bytes((source / "data" / "train.jsonl").read_bytes())
    first = run(TRAIN[:1], out=Path("b"), model=Path("model"), data=Path("data.jsonl"))
    path = first.path.absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    registry = Registry()
    job = resolve({}, path / "job.json", registry).job
    assert job.model == tmp_path / "model" and job.out == tmp_path / "b"
    resumed = resolve({"resume": str(path), "out": Path("other"), "name": "x"}, None, registry).job
    assert (resumed.out, resumed.name) == (tmp_path / "b", path.parent.name)
    summary = run_job(resumed, registry=registry, stages=STAGES, console=Console(quiet=True))
    assert summary.path == path and not (tmp_path / "elsewhere" / "other").exists()


def test_bug_what_was_deleted_was_said_to_be_done(tmp_path: Path) -> None:
    first = run(out=tmp_path)
    shutil.rmtree(first.path / "heads")
    again = run(out=tmp_path)
    assert again.path == first.path and (first.path / "heads" / "config.json").exists()
    assert seconds(again)["train"] == 0.0 < seconds(again)["export"]


def test_bug_an_old_merge_stayed_behind_new_heads(tmp_path: Path) -> None:
    first = run(out=tmp_path)
    run(("export",), out=tmp_path, checkpoint="0")
    assert not (first.path / "merged").exists()
    again = run(out=tmp_path, checkpoint="0")
    merged = json.loads((again.path / "merged" / "config.json").read_text())
    assert merged["autodeco"]["checkpoint"] == "qwen3-debug-0-0"
    run(("merge",), out=tmp_path, checkpoint="0", merge="none")
    assert not (first.path / "merged").exists()


@pytest.mark.parametrize("name", ["../../esc", "a/b", "..", "."])
def test_bug_a_name_could_lead_out_of_the_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no plain name"):
        run(TRAIN[:1], out=tmp_path / "out", name=name)
    assert not (tmp_path / "esc").exists() and not list(tmp_path.rglob("job.json"))


def own(tmp_path: Path) -> dict[str, Any]:
    """A model and data of the user's own."""
    source = run(TRAIN[:1], out=tmp_path / "source").path
    model = Path(shutil.copytree(source / "model", tmp_path / "model"))
    data = Path(shutil.copy(source / "data" / "train.jsonl", tmp_path / "train.jsonl"))
    return {"out": tmp_path / "out", "model": model, "data": data, "held_out": 0.2}


def test_bug_other_weights_or_another_template_were_the_same_job(tmp_path: Path) -> None:
    options = own(tmp_path)
    paths = [run(TRAIN[:1], **options).path]
    with (options["model"] / "chat_template.jinja").open("a") as stream:
        stream.write("{# another #}")
    paths.append(run(TRAIN[:1], **options).path)
    weights = options["model"] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in range(len(content) // 2, len(content)):
        content[position] ^= 1
    weights.write_bytes(bytes(content))
    paths.append(run(TRAIN[:1], **options).path)
    assert len(set(paths)) == 3
    assert run(TRAIN[:1], **options).path == paths[-1]


def test_bug_heads_to_start_from_were_known_by_their_path(tmp_path: Path) -> None:
    options = own(tmp_path)
    run(**options, seed=1)
    heads = next((tmp_path / "out").rglob("heads"))
    first = run(TRAIN[:1], **options, init_heads=heads, name="warm").path
    moved = Path(shutil.copytree(heads, tmp_path / "moved"))
    assert run(TRAIN[:1], **options, init_heads=moved, name="warm").path == first
    other = run(**options, seed=2).path / "heads"
    (other / "model.safetensors").replace(moved / "model.safetensors")
    assert run(TRAIN[:1], **options, init_heads=moved, name="warm").path != first


def test_bug_more_problems_of_the_built_in_task_were_not_made(tmp_path: Path) -> None:
    stages = (*STAGES, "evaluate")
    first = run(stages, out=tmp_path, evaluate_problems=2, max_new_tokens=2)
    again = run(("evaluate",), out=tmp_path, evaluate_problems=5, max_new_tokens=2)
    assert again.path == first.path
    result = json.loads((first.path / "evaluation.json").read_text())
    assert result["problems"] == 5
