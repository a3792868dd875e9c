"""An evaluation that was killed goes on from answers.jsonl; how many rows go at once, progress."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_evaluation import DIAL, GRID, PROBLEMS, VENDOR_FILE, Parity, measure
from tiny import tiny_heads, tiny_model

from autodeco.decoding import cache
from autodeco.decoding.progress import AnswersLine
from autodeco.decoding.sampler import Answer, sample_answers
from autodeco.decoding.settings import heads_policy, static_policy
from autodeco.decoding.store import AnswerLog
from autodeco.errors import EnvironmentProblem, UsageError
from autodeco.job import Job
from autodeco.run_directory import STAGE_OPTIONS

OPTIONS: dict[str, Any] = {"generation_config": VENDOR_FILE, "samples": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


class Killed(BaseException):
    """Ends an evaluation where it stands."""


def after(calls: int) -> Any:
    """A progress callback that kills at its n-th call."""
    left = [calls]

    def progress(done: int, total: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return progress


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("calls", [3, 12, 25, 40])
def test_bug_a_kill_lost_all_answers_of_an_evaluation(
    model: Any, tmp_path: Path, calls: int
) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    expected = measure(model, tiny_heads(), **OPTIONS, rows_at_once=32, answers_file=whole)
    with pytest.raises(Killed):
        measure(
            model,
            tiny_heads(),
            **OPTIONS,
            rows_at_once=32,
            answers_file=file,
            progress=after(calls),
        )
    before = lines(file)
    assert 1 <= len(before) < len(lines(whole)) and (calls < 4 or len(before) > 1)
    with file.open("a") as stream:
        stream.write('{"setting": "T=1", "problem": 1, "sam')  # torn by the kill
    told: list[int] = []
    said: list[str] = []
    found = measure(
        model,
        tiny_heads(),
        **OPTIONS,
        answers_file=file,
        progress=lambda done, _: told.append(done),
        say=said.append,
    )
    assert told[0] <= len(before) - 1 and told == sorted(told)
    assert f"{told[-1]:,} answers" in said[0] and "at most 32 at a time" in said[0]
    assert (f"({len(before) - 1} are in answers.jsonl already)" in said[0]) == (len(before) > 1)
    assert found.to_json() == expected.to_json()  # bit by bit
    for one, other in zip(found.shown, expected.shown, strict=True):
        for name in ("ids", "temperature", "top_p"):
            a, b = getattr(one.answer, name), getattr(other.answer, name)
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    key = ("setting", "problem", "sample")
    a, b = (sorted(lines(f)[1:], key=lambda x: [x[k] for k in key]) for f in (file, whole))
    assert a == b and lines(file)[0] == lines(whole)[0]


def test_an_evaluation_that_is_whole_is_not_sampled_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    expected = measure(model, tiny_heads(), **OPTIONS, answers_file=file)
    text = file.read_text()
    monkeypatch.setattr(type(model), "forward", None)
    monkeypatch.setattr(type(model.model), "forward", None)
    assert measure(model, tiny_heads(), **OPTIONS, answers_file=file).to_json() == (
        expected.to_json()
    )
    assert file.read_text() == text
    one = next(line for line in lines(file)[1:] if line["setting"] == "heads")
    assert one["text"].startswith(("the answer is", "none"))
    assert len(one["temperature"]) == len(one["top_p"]) == len(one["ids"])


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 12},
        {"max_new_tokens": 5},
        {"problems": PROBLEMS[:-1]},
        {"grid": GRID[:1]},
        {"eos_ids": [6]},
        {"heads": tiny_heads(spread=3.0)},
        {"model": tiny_model(vocab_size=98)},
    ],
)
def test_answers_of_another_evaluation_are_not_taken(
    model: Any, tmp_path: Path, changed: dict[str, Any]
) -> None:
    file = tmp_path / "answers.jsonl"
    measure(model, tiny_heads(), answers_file=file)
    asked = {"model": model, "heads": tiny_heads(), **changed}
    fresh = measure(**asked)
    found = measure(**asked, answers_file=file)
    assert found.to_json() == fresh.to_json()
    assert lines(file)[0]["format"] == 1 and len(lines(file)) > 1


@pytest.mark.parametrize("content", ["", "no json\n", "[1]\n", "{}\n", '{"rows_at_once": 3}\n'])
def test_a_file_that_is_none_of_ours_begins_anew(model: Any, tmp_path: Path, content: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    measure(model, None, answers_file=file)
    assert lines(file)[0]["format"] == 1


def test_the_rows_at_once_of_a_file_hold_unless_others_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for given, default, rows in ((None, 9, 9), (None, 5, 9), (4, 5, 4), (None, 5, 4)):
        log = AnswerLog(path, {"a": [1]}, rows_at_once=given, default_rows=default)
        log.close()
        assert log.rows_at_once == rows and lines(path) == [{"a": [1], "rows_at_once": rows}]


def test_numbers_come_back_bit_by_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    t, p = (random.random(500, dtype=np.float32) for _ in range(2))
    t[:3] = [1e-4, np.nextafter(np.float32(1), np.float32(2)), 1.9999999]
    kept = Answer(2, 0, 1, np.arange(500, dtype=np.int32), t, p, float(random.random() * 99), False)
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, {}, rows_at_once=None, default_rows=1)
    log.add("heads", kept, "x")
    log.close()
    log = AnswerLog(path, {}, rows_at_once=None, default_rows=1)
    (key,) = known = log.known([static_policy(1.0), heads_policy()])
    assert key == (2, 1, 1) and log.known([static_policy(1.0)]) == {}
    back: Any = known[key]
    assert back.temperature.tobytes() == t.tobytes() and back.top_p.tobytes() == p.tobytes()
    assert back.ids.tolist() == kept.ids.tolist() and back.entropy == kept.entropy
    assert (back.policy, back.finished) == (1, False)


def test_two_settings_of_one_name_cannot_be_kept_apart(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two settings are called 'T=1'"):
        measure(model, None, grid=[static_policy(1.0)] * 2, answers_file=tmp_path / "a.jsonl")


def test_bug_a_gigabyte_held_two_answers_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-8B, prompts of 300 tokens and answers of 2,048, on a card with 60 GiB free."""

    class Model:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

        class config:
            num_attention_heads, num_key_value_heads, head_dim = 32, 8, 128
            num_hidden_layers, hidden_size, intermediate_size = 36, 4096, 12288

            @classmethod
            def get_text_config(cls, decoder: bool = False) -> Any:
                return cls

        def get_output_embeddings(self) -> Any:
            return torch.nn.Linear(1, 151936, device="meta")

    prompts = [[0] * 300, [0]]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 2**30)
    assert 100 < cache.rows_that_fit(Model(), prompts, 2048) < 180
    assert cache.rows_that_fit(Model(), prompts, 128) > 500
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * 2**30))
    assert cache.rows_that_fit(Model(), prompts, 2048) == 1
    monkeypatch.setattr(Model, "device", torch.device("cpu"))
    monkeypatch.setattr(cache, "_free_memory", lambda: 0)
    few = cache.rows_that_fit(Model(), prompts, 2048)
    assert 1 <= few <= 4
    monkeypatch.setattr(cache, "_free_memory", lambda: 64 * 2**30)
    assert cache.rows_that_fit(Model(), prompts, 2048) > 10 * few


def test_free_memory_of_this_machine_is_something() -> None:
    assert 0 <= cache._free_memory() < 2**50


def test_a_cache_that_grows_gives_the_answers_of_one_that_need_not(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled() -> list[Answer]:
        prompts = [Parity()(problem.problem)["input_ids"] for problem in PROBLEMS]
        policies = [*GRID, *DIAL]
        options: dict[str, Any] = {"samples": 2, "max_new_tokens": 40, "eos_ids": [5, 9, 11]}
        return sample_answers(model, tiny_heads(), prompts, policies, **options, seed=1)

    expected = sampled()
    assert len({len(answer.ids) for answer in expected}) > 10
    monkeypatch.setattr(cache, "_BLOCK", 3)
    for one, other in zip(expected, sampled(), strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.entropy == other.entropy


def test_no_memory_for_so_many_rows_says_what_to_do(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.model), "forward", full)
    with pytest.raises(EnvironmentProblem, match="out of memory with 40 answers") as caught:
        measure(model, None, rows_at_once=40)
    assert "--evaluate-rows 20" in str(caught.value.fix)


def test_rows_at_once_is_an_option_that_changes_no_result() -> None:
    job = Job(evaluate_rows=7)
    assert "evaluate_rows" not in job.result_values() and Job().evaluate_rows is None
    assert all("evaluate_rows" not in options for options in STAGE_OPTIONS.values())


def test_bug_without_a_terminal_an_evaluation_said_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("autodeco.decoding.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with AnswersLine(Console(file=out, width=100), seconds=10) as line:
        for second in range(31):
            now[0] = 100.0 + second
            line.update(1000 if second < 15 else 1100, 1500)
    assert [text.strip() for text in out.getvalue().splitlines()] == [
        "1,000/1,500 answers after 10 s",
        "1,100/1,500 answers after 20 s, about 80 s left",
        "1,100/1,500 answers after 30 s, about 120 s left",
    ]


def test_on_a_terminal_the_bar_moves(model: Any) -> None:
    out = io.StringIO()
    with AnswersLine(Console(file=out, force_terminal=True, width=80), seconds=0) as line:
        line.update(3, 8)
        assert line._bar is not None
        line._bar.refresh()
    assert "3/8" in out.getvalue()
