"""What fuzzing and reading found: files that were a traceback, an endless wait, or believed."""

from __future__ import annotations

import ast
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco.decoding.policy import check_scale
from autodeco.decoding.problems import load_problems
from autodeco.decoding.stage import vendor_generation_config
from autodeco.decoding.store import AnswerLog
from autodeco.errors import AutodecoError, DataError, RunError, UsageError, WeightsError
from autodeco.files import read_json, read_object
from autodeco.job import Job
from autodeco.job_values import coerce_values
from autodeco.registry import Registry
from autodeco.run_directory import RunDirectory, open_run
from autodeco.scaffold.literals import quoted
from autodeco.settings import read_config, resolve
from autodeco.training import data
from autodeco.training.data import read_records
from autodeco.training.logging import read_metrics
from autodeco.training.tokenization import eos_token_ids
from autodeco_plugin_qwen3.family import FAMILY


@contextmanager
def quick(seconds: float = 5.0) -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    ['{"a":' * 9000 + "1" + "}" * 9000, "9" * 5000, '{"a": "\\ud800"}', '"\\udc00"', "\ufeff{}"],
)
def test_bug_a_json_file_that_python_cannot_take_was_a_traceback(
    tmp_path: Path, content: str
) -> None:
    with pytest.raises(WeightsError) as caught:
        read_json(write(tmp_path / "config.json", content))
    assert "config.json" in str(caught.value.where)


def test_bug_a_pipe_for_a_configuration_was_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WeightsError, match="no regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", ["[]", "7", '"text"', "null", "true"])
def test_bug_a_configuration_that_is_no_object_was_a_traceback(
    tmp_path: Path, content: str
) -> None:
    for name in ("config.json", "generation_config.json"):
        write(tmp_path / name, content)
    write(tmp_path / "stages" / "train.json", content)
    readers: list[Callable[[], Any]] = [
        lambda: read_object(tmp_path / "config.json"),
        lambda: eos_token_ids(tmp_path, None),
        lambda: vendor_generation_config(tmp_path),
        lambda: RunDirectory(tmp_path, True).read_manifest("train"),
        lambda: Registry().resolve("qwen3", tmp_path, "auto"),
    ]
    for read in readers:
        with pytest.raises(AutodecoError, match="not an object"):
            read()


@pytest.mark.parametrize("ids", [1.5, "2", [[1]], [1, None], {"a": 1}, True, [False], [10**30]])
def test_bug_end_tokens_of_any_type_were_believed(tmp_path: Path, ids: Any) -> None:
    write(tmp_path / "generation_config.json", {"eos_token_id": ids})
    with pytest.raises(WeightsError, match="eos_token_id"):
        eos_token_ids(tmp_path, None)


ARCHITECTURE = FAMILY.architecture(FAMILY.preset("debug-moe").architecture)
SIZES = ARCHITECTURE.config_json(FAMILY.preset("debug-moe").shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_experts": 10**9},
        {"num_hidden_layers": 9999, "num_experts": 19999},
        {"hidden_size": 10**12},
        {"vocab_size": 10**30},
        {"num_attention_heads": 2**63},
    ],
)
def test_bug_the_sizes_of_a_config_were_counted_out_before_they_were_checked(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write(tmp_path / "config.json", {**SIZES, **changes})
    with quick(), pytest.raises(AutodecoError, match="no model has"):
        Registry().resolve("qwen3", tmp_path, "auto")


def test_bug_layers_were_counted_out_for_a_checkpoint_that_has_none() -> None:
    shape = ARCHITECTURE.shape_of({**SIZES, "num_hidden_layers": 9000}, where="")
    with quick(), pytest.raises(WeightsError, match="9,000 layers cannot be made of 1 tensors"):
        FAMILY.weight_map.bind(shape, ["a"])


def laughs(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", laughs(12) + "\nepochs: *a11\n", "more than a configuration does"),
        ("a.yaml", laughs(12) + "\nchat_template_kwargs: {a: *a11}\n", "more than a config"),
        ("a.yaml", "a: &a [*a]\n", "more than a config"),
        ("a.yaml", "b: &b {x: 1}\nc: {<<: [*b, *b]}\n", "<< is not read"),
        ("a.yaml", "seed: 1\nseed: 2\n", "'seed' stands there twice"),
        ("a.yaml", "chat_template_kwargs: {a: 2001-01-01}\n", "a date stands in it"),
        ("a.yaml", "chat_template_kwargs: {1: a}\n", "no text, but a name"),
        ("a.yaml", "chat_template_kwargs: !!set {a, b}\n", "a set stands in it|no option takes"),
        ("a.yaml", "x: !!python/object/apply:os.system ['echo']\n", "malformed configuration"),
        ("a.yaml", "learning_rate: 1" + "0" * 400, "more than 63 bits"),
        ("a.yaml", 'out: "a\\0b"', "no text that can be written"),
        ("a.json", '{"seed": 1, "seed": 2}', "'seed' stands there twice"),
        ("a.json", '{"name": "\\ud800"}', "no text that can be written"),
        ("a.json", '{"chat_template_kwargs": ' + "[" * 5000 + "]" * 5000 + "}", "malformed|more"),
        ("a.json", '{"checkpoint": "' + "9" * 6000 + '"}', "neither best, last nor a step"),
        ("a.json", '{"time_limit": "' + "9" * 6000 + '"}', "no duration"),
        ("a.toml", "chat_template_kwargs = {a = 2001-01-01}", "a date stands in it"),
    ],
)
def test_bug_a_configuration_that_is_small_in_the_file_alone(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with quick(), pytest.raises(UsageError, match=message) as caught:
        read_config(write(tmp_path / name, content))
    assert len(str(caught.value)) < 20_000


def test_bug_an_option_that_is_no_text_ended_the_run_when_it_was_recorded() -> None:
    for value in (os.fsdecode(b"\xff"), "a\0b"):
        for name in ("data", "name", "resume"):
            with pytest.raises(UsageError, match="NUL, or bytes that are not UTF-8"):
                coerce_values({name: value}, where="command line")
    with pytest.raises(UsageError, match="63 bits"):
        coerce_values({"learning_rate": 10**400}, where="command line")


def test_bug_a_job_json_without_resume_was_a_traceback(tmp_path: Path) -> None:
    run = tmp_path / "name" / "20260101-000000"
    write(run / "job.json", {"plugin": "qwen3", "seed": 7})
    resolved = resolve({"resume": str(run)}, None, Registry())
    assert resolved.job.seed == 7 and resolved.job.name == "name"


@pytest.mark.parametrize("content", ["[]", "7", '{"inputs": [1]}', '{"inputs": "x"}'])
def test_bug_a_job_json_of_another_kind_was_a_traceback(tmp_path: Path, content: str) -> None:
    run = tmp_path / "name" / "20260101-000000"
    write(run / "job.json", content)
    job = Job(plugin="qwen3", preset="demo", name="name", out=tmp_path)
    with pytest.raises((RunError, WeightsError)):
        open_run(job.replace(resume=str(run)), "digest", {"data": "x"}, frozenset())


@pytest.mark.parametrize("row", ["1.5", "[]", "null", '{"loss": 1}', '{"step": "1"}', "[" * 9000])
def test_bug_a_row_of_metrics_without_a_step_was_a_traceback(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "metrics.jsonl", f'{{"step": 1}}\n{row}\n{{"step": 2}}\n')
    with pytest.raises(RunError) as caught:
        read_metrics(path)
    assert caught.value.where == f"{path}:2"
    assert read_metrics(write(path, f'{{"step": 1}}\n{row}')) == [{"step": 1}]  # torn by a kill


def test_bug_an_answer_of_numbers_too_large_was_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, {"heads": "h"}, rows_at_once=4, default_rows=4).close()
    good = {
        "setting": "greedy",
        "problem": 0,
        "sample": 0,
        "finished": True,
        "entropy": 0.5,
        "ids": [4],
        "temperature": None,
        "top_p": None,
    }
    lines = [good, {**good, "sample": 1, "ids": [10**30]}, {**good, "problem": 1e999}]
    with path.open("a") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines) + "[" * 9000 + "\n")
    log = AnswerLog(path, {"heads": "h"}, rows_at_once=None, default_rows=1)
    log.close()
    assert len(log) == 1 and log.rows_at_once == 4


def test_bug_a_line_without_an_end_filled_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_LONGEST_LINE", 1000)
    long = json.dumps({"problem": "x" * 2000, "gt": "1"})
    path = write(tmp_path / "data.jsonl", f'{{"problem": "x", "gt": 1}}\n{long}')
    for read in (lambda: list(read_records(path)), lambda: load_problems(path)):
        with pytest.raises(DataError, match="longer than") as caught:
            read()
        assert caught.value.where == f"{path}:2"


def test_a_sparse_file_without_line_ends_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole
    with quick(), pytest.raises(DataError, match="64 MiB"):
        list(read_records(path))


@pytest.mark.parametrize("line", ['{"a": 1, "a": 2}', '{"messages": [{"role": "x", "role": "y"}]}'])
def test_bug_of_two_values_of_one_name_the_last_was_taken(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "data.jsonl", f"\n{line}\n")
    for read in (lambda: list(read_records(path)), lambda: load_problems(path)):
        with pytest.raises(DataError, match="stands there twice") as caught:
            read()
        assert str(caught.value.where).startswith(f"{path}:2")


def test_bug_problems_with_a_byte_order_mark_were_refused(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "1+1", "gt": "2"}\r\n')
    assert [problem.gt for problem in load_problems(path)] == ["2"]


def test_bug_a_scale_of_more_digits_than_a_float_was_a_traceback() -> None:
    for value in (10**400, float("inf"), float("nan"), 0, -1, True, "1", None):
        with pytest.raises(UsageError, match="a positive number"):
            check_scale("top_p_scale", value)


@given(st.text())
@settings(max_examples=50, deadline=None, database=None, derandomize=True)
def test_bug_a_text_of_a_config_was_another_one_in_the_source_of_a_new_plugin(text: str) -> None:
    assert ast.literal_eval(quoted(text)) == text


@pytest.mark.parametrize("text", ["\\'\\", 'a\\"b', "a\\\nimport os", "\\", '"', "\\d+\\", "\r\\"])
def test_texts_with_backslashes_stay_what_they_are(text: str) -> None:
    assert ast.literal_eval(quoted(text)) == text
