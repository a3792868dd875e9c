"""evaluate on paths: what it takes, what it takes over from the heads, what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import TINY, failing, run_json
from tiny import save_tiny, save_tiny_heads, tiny_model

from autodeco.cli import main
from autodeco.decoding import command
from autodeco.heads.files import load_heads
from autodeco.heads.merge import merge
from autodeco.heads.places import is_merged
from autodeco.stories import write_problems

SMALL = ("--problem-format", "text", "--max-new-tokens", "4", "--chat-template-kwargs", '{"a": 1}')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose job asks in a way of its own."""
    out = tmp_path_factory.mktemp("paths")
    command = ("--out", str(out), *TINY, *SMALL, "--evaluate-problems", "2", "--max-length", "256")
    main(["run", *command])
    (found,) = (out / "qwen3-debug").iterdir()
    return found


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    write_problems(path, 1, count=2)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What evaluations are called with, each beside its model."""
    found: list[Any] = []

    def spy(model: Any, heads: Any, *_: Any, **options: Any) -> Any:
        found.append((model, heads, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_and_report", spy)
    return found


def evaluate(model: Path, problems: Path, *more: str) -> list[str]:
    output = str(problems.parent / "report")
    arguments = ("--model", str(model), "--problems", str(problems), "--output", output)
    return ["evaluate", *arguments, *more]


def stopped(arguments: list[str]) -> None:
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(arguments)


def test_bug_evaluate_on_paths_ignored_how_the_run_had_asked(
    run: Path, problems: Path, asked: list[Any]
) -> None:
    recorded = load_heads(run / "merged").metadata["evaluate"]
    assert recorded == {
        "problem_format": "text",
        "max_new_tokens": 4,
        "chat_template_kwargs": {"a": 1},
    }
    stopped(evaluate(run / "merged", problems))
    stopped(evaluate(run / "merged", problems, "--max-new-tokens", "9", "--problem-format", "chat"))
    stopped(evaluate(run / "model", problems, "--heads-dir", str(run / "heads")))
    stopped(evaluate(run / "model", problems))
    names = ("problem_format", "max_new_tokens", "chat_template_kwargs")
    found = [tuple(options[name] for name in names) for _, _, options in asked]
    assert found == [
        ("text", 4, {"a": 1}),
        ("chat", 9, {"a": 1}),  # what is given wins
        ("text", 4, {"a": 1}),
        ("auto", 2048, {}),  # a base remembers nothing
    ]


def test_what_heads_remember_is_checked(
    run: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = tmp_path / "heads"
    heads.mkdir()
    for file in (run / "heads").iterdir():
        (heads / file.name).write_bytes(file.read_bytes())
    config = json.loads((heads / "config.json").read_text())
    config["evaluate"]["max_new_tokens"] = -3
    (heads / "config.json").write_text(json.dumps(config))
    arguments = evaluate(run / "model", problems, "--heads-dir", str(heads))
    code, _, said = failing(capsys, *arguments)
    assert code == 2 and "max_new_tokens: -3 is out of range" in said and str(heads) in said


def test_bug_evaluate_on_paths_refused_the_dtype_that_its_own_error_proposes(
    run: Path, problems: Path, asked: list[Any]
) -> None:
    more = ("--dtype", "bfloat16", "--evaluate-rows", "3", "--log-seconds", "1.5")
    stopped(evaluate(run / "merged", problems, *more))
    stopped(evaluate(run / "model", problems, *more))
    for model, _, options in asked:
        assert model.dtype == torch.bfloat16
        assert (options["rows_at_once"], options["log_seconds"]) == (3, 1.5)


def test_bug_evaluate_of_a_merged_checkpoint_without_an_output_said_to_split_it(
    run: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("evaluate", "--model", run / "merged", "--problems", problems)
    code, _, said = failing(capsys, *arguments)
    assert code == 2 and "add --output DIR" in said and "split" not in said


def test_bug_the_published_layout_was_evaluated_without_its_heads(
    problems: Path, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config has a model_type and no key `autodeco`."""
    base = save_tiny(tiny_model(), tmp_path / "base")
    path = merge(
        base, save_tiny_heads(tmp_path / "h", base), tmp_path / "m", layout="autodeco"
    ).path
    config = json.loads((path / "config.json").read_text())
    del config["autodeco"]
    (path / "config.json").write_text(json.dumps(config))
    assert is_merged(path) and not is_merged(base) and not is_merged(tmp_path)
    monkeypatch.setattr(command, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(command, "eos_token_ids", lambda *_: ())
    stopped(evaluate(path, problems))
    assert asked[0][1] is not None


def test_an_evaluation_goes_on_in_the_same_output(
    run: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = evaluate(run / "merged", problems)
    first = run_json(capsys, *arguments)
    file = problems.parent / "report" / "answers.jsonl"
    text = file.read_text()
    file.write_text("".join(text.splitlines(keepends=True)[:20]) + "{")
    again = run_json(capsys, *arguments)
    assert again == first and sorted(file.read_text().split("\n")) == sorted(text.split("\n"))
    assert (run / "answers.jsonl").exists()
