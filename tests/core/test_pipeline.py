"""A whole run on the tiny random model: stages, resume, refusals, the lock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from autodeco import __version__
from autodeco.cli import main
from autodeco.errors import DataError, RunError, WeightsError
from autodeco.job import Job
from autodeco.lock import run_lock
from autodeco.pipeline import RunSummary, run_job
from autodeco.registry import Registry
from autodeco.settings import resolve

STAGES = ("import", "build", "attach", "train", "export", "merge")


def run(out: Path, stages: tuple[str, ...] = STAGES, **options: Any) -> RunSummary:
    registry = Registry()
    values = {"plugin": "qwen3", "preset": "debug", "out": out, "task_samples": 32, **options}
    job = resolve(values, None, registry).job
    return run_job(job, registry=registry, stages=stages, console=Console(quiet=True))


def test_run_writes_what_the_run_directory_promises(tmp_path: Path) -> None:
    summary = run(tmp_path)
    names = {path.name for path in summary.path.iterdir()}
    assert {"job.json", "stages", "checkpoints", "heads", "merged", "metrics.jsonl"} <= names
    done = {path.stem for path in (summary.path / "stages").iterdir()}
    assert done == set(STAGES)
    assert not list(tmp_path.rglob("*.partial"))
    rows = [json.loads(line) for line in (summary.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 2, 3, 4]
    base = load_file(summary.path / "model" / "model.safetensors")
    merged = load_file(summary.path / "merged" / "model.safetensors")
    assert all(bool((base[name] == merged[name]).all()) for name in base)


def test_unfinished_run_is_continued_and_another_job_is_not(tmp_path: Path) -> None:
    first = run(tmp_path, STAGES[:4])
    again = run(tmp_path)
    assert again.path == first.path
    assert [row[2] for row in again.rows if row[0] == "train"] == [0.0]
    other = run(tmp_path, STAGES[:4], seed=1)
    assert other.path != first.path


def test_resume_of_a_changed_job_is_refused_with_the_difference(tmp_path: Path) -> None:
    first = run(tmp_path, STAGES[:3])
    with pytest.raises(RunError, match="seed: 0 there, 5 now"):
        run(tmp_path, STAGES[:4], seed=5, resume=str(first.path))
    allowed = run(tmp_path, STAGES[:4], seed=5, resume=str(first.path), allow_change="seed")
    assert allowed.path == first.path
    with pytest.raises(RunError, match="no run is there"):
        run(tmp_path, resume=str(tmp_path / "nothing"))


def test_second_process_is_refused_by_the_lock(tmp_path: Path) -> None:
    first = run(tmp_path, STAGES[:1])
    lock = run_lock(first.path)
    try:
        with pytest.raises(RunError, match="in use by"):
            run(tmp_path)
    finally:
        lock.release()
    assert run(tmp_path).path == first.path


def test_a_stage_alone_is_done_again_in_the_trained_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run of this job is trained"):
        run(tmp_path, ("export",))
    whole = run(tmp_path, (*STAGES, "evaluate"), evaluate_problems=2, max_new_tokens=4)
    assert json.loads((whole.path / "heads" / "config.json").read_text())["checkpoint"]
    alone = run(tmp_path, ("merge",), merge="autodeco")
    assert alone.path == whole.path and [row[0] for row in alone.rows] == ["merge"]
    merged = json.loads((whole.path / "merged" / "config.json").read_text())
    assert merged["model_type"] == "autodeco"
    again = run(tmp_path, ("export",), checkpoint="0")
    config = json.loads((again.path / "heads" / "config.json").read_text())
    assert config["checkpoint"] == "qwen3-debug-0-0"


def test_bug_a_resumed_run_kept_what_was_exported_and_merged_with_other_options(
    tmp_path: Path,
) -> None:
    first = run(tmp_path)
    again = run(tmp_path, temperature_scale=0.5)
    assert again.path == first.path
    seconds = {row[0]: row[2] for row in again.rows}
    assert seconds["import"] == seconds["train"] == 0.0 < seconds["export"]
    for config in (again.path / "heads", again.path / "merged" / "autodeco"):
        assert json.loads((config / "config.json").read_text())["temperature_scale"] == 0.5
    third = run(tmp_path, temperature_scale=0.5, merge="autodeco")
    seconds = {row[0]: row[2] for row in third.rows}
    assert seconds["export"] == 0.0 < seconds["merge"]
    assert [row[2] for row in run(tmp_path, temperature_scale=0.5, merge="autodeco").rows] == [
        0
    ] * 4


def test_the_evaluation_stage_measures_and_reports(tmp_path: Path) -> None:
    stages = (*STAGES, "evaluate")
    summary = run(tmp_path, stages, evaluate_problems=3, max_new_tokens=4)
    result = json.loads((summary.path / "evaluation.json").read_text())
    roles = {setting["role"] for setting in result["settings"]}
    assert roles == {"greedy", "vendor", "static", "mean shift", "heads"}
    assert all(len(setting["correct"]) == 3 for setting in result["settings"])
    page = (summary.path / "report.html").read_text()
    assert page.count("<svg") == 1 + 6 and "http" not in page.replace("http://www.w3.org", "")
    assert summary.results == result and summary.evaluation.row_count == len(result["settings"]) + 1


def test_own_model_and_data(tmp_path: Path) -> None:
    built_in = run(tmp_path / "a", STAGES[:4])
    model = shutil.copytree(built_in.path / "model", tmp_path / "model")
    data = shutil.copy(built_in.path / "data" / "train.jsonl", tmp_path / "train.jsonl")
    own = run(tmp_path / "b", model=model, data=Path(data), held_out=0.1)
    assert not (own.path / "model").exists() and not (own.path / "data").exists()
    assert json.loads((own.path / "job.json").read_text())["model"] == str(model)


def test_missing_data_and_damaged_model_stop_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(tmp_path / "out", data=tmp_path / "nowhere.jsonl")
    built_in = run(tmp_path / "a", STAGES[:1])
    model = shutil.copytree(built_in.path / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    data = built_in.path / "data" / "train.jsonl"
    with pytest.raises(WeightsError, match="cut short"):
        run(tmp_path / "out", model=model, data=data)
    assert not (tmp_path / "out").exists()


def test_changed_data_is_another_job(tmp_path: Path) -> None:
    built_in = run(tmp_path / "a", STAGES[:1])
    data = tmp_path / "train.jsonl"
    data.write_text((built_in.path / "data" / "train.jsonl").read_text())
    model = shutil.copytree(built_in.path / "model", tmp_path / "model")
    first = run(tmp_path / "b", STAGES[:4], model=model, data=data, held_out=0.1)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    second = run(tmp_path / "b", STAGES[:4], model=model, data=data, held_out=0.1)
    assert first.path != second.path


def test_job_json_is_a_valid_config(tmp_path: Path) -> None:
    summary = run(tmp_path, STAGES[:1])
    resolved = resolve({}, summary.path / "job.json", Registry())
    assert isinstance(resolved.job, Job) and resolved.job.preset == "debug"


def test_exit_codes_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["run", "--plugin", "nothing"], 3, "no plugin 'nothing'"),
        (["run", "--plugin", "qwen3", "--preset", "8b"], 3, "--model"),
        (["run", "--plugin", "qwen3", "--nonsense"], 2, "nonsense"),
        (["train", "--plugin", "qwen3", "--data", str(tmp_path / "no.jsonl")], 4, "no.jsonl"),
    ]
    for arguments, code, message in cases:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *(["--out", str(tmp_path)] if code > 2 else [])])
        assert stopped.value.code == code, arguments
        assert message in capsys.readouterr().err
    main(["--version"])
    assert __version__ in capsys.readouterr().out
