"""Targets of ``fuzz.py`` beside checkpoints: data, configurations, and what a run left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz_targets import Target, _demo, _family, _make_formats, _make_random  # type: ignore[import-not-found]

from autodeco.errors import AutodecoError

_CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]
_RECORDS = (
    {"prompt": "Tom has 12.", "completion": " So 30."},
    {"inputs": {"p_ids": [1, 2, 3], "r_ids": [4, 5]}},
    {"messages": _CHAT, "prompt": None},
    {"messages": _CHAT, "tools": None},
)
_PROBLEMS = (
    {"problem": "2 + 2", "gt": "4"},
    {"problem": "0.1 + 0.2", "gt": 0.3},
    {"messages": [{"role": "user", "content": "2 + 2?"}], "gt": 4},
)


def _lines(path: Path, records: Any) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@cache
def _tokenizer() -> Any:
    from autodeco.training.tokenization import load_tokenizer

    tokenizer = load_tokenizer(_demo())
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    return tokenizer


def _read_data(directory: Path) -> None:
    from autodeco.training.data import load_samples

    path = directory / "data.jsonl"
    try:
        load_samples(path, _tokenizer(), vocab_size=10**6, max_length=64, eos_token_ids=(0,))
    except AutodecoError as error:
        if str(path) not in str(error.where):
            raise ValueError(f"the refusal names no file: {error}") from error
        raise


def _read_problems(directory: Path) -> None:
    from autodeco.decoding.problems import choose_format, load_problems, problem_prompts

    problems = load_problems(directory / "problems.jsonl")
    for chat in (choose_format(problems, _tokenizer()) == "chat", True):
        problem_prompts(problems, _tokenizer(), chat=chat)


def _make_settings(directory: Path) -> None:
    from autodeco.job import Job

    values = Job(plugin="qwen3", chat_template_kwargs={"a": [1, "b"]}).to_json()
    (directory / "job.json").write_text(json.dumps(values))
    (directory / "job.yaml").write_text(
        "plugin: qwen3\nlearning_rate: 1e-4\npacking: yes\nchat_template_kwargs: {a: [1, b]}\n"
        "common: &c {seed: 1}\n".replace("common: &c {seed: 1}\n", "seed: &s 1\nepochs: *s\n")
    )
    (directory / "job.toml").write_text(
        'plugin = "qwen3"\nlearning_rate = 1e-4\n[chat_template_kwargs]\na = [1]\n'
    )


def _read_settings(directory: Path) -> None:
    from autodeco.registry import Registry
    from autodeco.settings import resolve

    for name in ("job.json", "job.yaml", "job.toml"):
        values = resolve({}, directory / name, Registry()).job
        json.dumps(values.to_json())
        values.digest({})


def _make_run(directory: Path) -> None:
    """A run directory as a killed run leaves it, without its big files."""
    from autodeco.decoding.store import AnswerLog
    from autodeco.heads.modules import DecodingHeads, HeadsConfig
    from autodeco.job import Job
    from autodeco.run_directory import RunDirectory, record_job
    from autodeco.training.checkpoint import TrainingState, save_checkpoint

    run = RunDirectory(directory / "name" / "20260101-000000", True)
    (run.path / "stages").mkdir(parents=True)
    job = Job(plugin="qwen3", preset="demo", name="name", out=directory)
    record_job(run, job, "0123456789abcdef", {"data": "x"})
    run.complete("train", 1.0, output="checkpoints", metrics={"loss": 1.0})
    heads = DecodingHeads(HeadsConfig(8, intermediate_size=4))
    state = TrainingState(3, 96, 3, 10, 0, "0123456789abcdef", 3, 1.5, {"loss": 1.5})
    moments = {name: torch.zeros_like(t) for name, t in heads.state_dict().items()}
    save_checkpoint(run.path / "checkpoints", "m", heads, moments, state, {})
    _lines(run.path / "metrics.jsonl", [{"step": n, "loss": 1.0 / n} for n in (1, 2, 3)])
    log = AnswerLog(run.path / "answers.jsonl", {"heads": "h"}, rows_at_once=4, default_rows=4)
    log.close()
    answer = {
        "setting": "greedy", "problem": 0, "sample": 0, "finished": True, "entropy": 0.5,
        "text": "4", "ids": [4, 5], "temperature": [0.5, 1.0], "top_p": None,
    }  # fmt: skip
    with (run.path / "answers.jsonl").open("a") as stream:
        stream.write(json.dumps(answer) + "\n")


def _read_run(directory: Path) -> None:
    """Continuing: which run, how far, from what, with which answers."""
    from autodeco.decoding.store import AnswerLog
    from autodeco.heads.modules import DecodingHeads, HeadsConfig
    from autodeco.job import Job
    from autodeco.run_directory import STAGES, open_run
    from autodeco.settings import read_config
    from autodeco.training.checkpoint import find_checkpoint, load_into, load_newest
    from autodeco.training.logging import MetricsLog, read_metrics

    out = directory.parent / "copy"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(directory, out)
    job = Job(plugin="qwen3", preset="demo", name="name", out=out)
    path = out / "name" / "20260101-000000"
    problems: list[AutodecoError] = []

    def tried(read: Any) -> Any:
        try:
            return read()
        except AutodecoError as error:
            problems.append(error)
            return None

    tried(lambda: read_config(path / "job.json"))
    for chosen in (job, job.replace(resume=str(path))):
        found = tried(lambda chosen=chosen: open_run(chosen, "0123456789abcdef", {}, frozenset()))
        for stage in STAGES if found else ():
            if found[0].done(stage):
                tried(lambda stage=stage, found=found: found[0].read_manifest(stage))
    tried(lambda: read_metrics(path / "metrics.jsonl"))
    tried(lambda: MetricsLog(path, 2, "none", {}).close())
    header = {"heads": "h"}
    log = AnswerLog(path / "answers.jsonl", header, rows_at_once=None, default_rows=4)
    log.close()
    heads = DecodingHeads(HeadsConfig(8, intermediate_size=4))
    for which in ("best", "last", "3"):
        one = tried(lambda which=which: find_checkpoint(path / "checkpoints", which))
        if one:
            tried(lambda one=one: load_into(heads, one))
    tried(lambda: load_newest(path / "checkpoints", lambda text: None))
    if problems:
        raise problems[0]


def _make_imported(directory: Path) -> None:
    from autodeco.engines.select import build_engine  # noqa: F401  - the engine's cures
    from autodeco.job import Job

    base = directory.parent / "to-import"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    _make_random(base)
    from autodeco.convert.importing import ready_weights

    job = Job(
        plugin="qwen3", preset="debug", model=base, device="cpu", import_format="torch_dist",
        import_dir=directory / "made",
    )  # fmt: skip
    ready_weights(_family(), job)
    for path in (directory / "made").iterdir():
        path.rename(directory / path.name)
    (directory / "made").rmdir()


def _read_imported(directory: Path) -> None:
    from autodeco.convert.stored import read_manifest, verify
    from autodeco.convert.stored_reader import StoredReader

    manifest = read_manifest(directory)
    verify(directory, manifest)
    with StoredReader(directory) as reader:
        for part in manifest.parts:
            for written in part.pieces:
                reader.read(written.piece.target)


def _read_torch_dist(directory: Path) -> None:
    """A checkpoint of torch.distributed: its ``.metadata``, a pickle, and its records."""
    from autodeco.convert.torch_dist_reader import TorchDistReader

    with TorchDistReader(directory / "weights") as reader:
        for key in reader.metadata:
            reader.read(key)


def _make_cast(directory: Path) -> None:
    _make_formats(directory)
    config = {"model_type": "x", "dtype": "bfloat16", "quantization_config": {"bits": 8}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')


def _read_cast(directory: Path) -> None:
    from rich.console import Console

    from autodeco.convert.casting import cast_checkpoint

    output = directory.parent / "cast"
    shutil.rmtree(output, ignore_errors=True)
    cast_checkpoint(directory, output, workers=1, console=Console(quiet=True))


def _make_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    )


def _read_index_names(directory: Path) -> None:
    from autodeco.engines.megatron.landing import tensor_names

    tensor_names(directory / "model.safetensors.index.json")


def _read_new_plugin(directory: Path) -> None:
    from autodeco.scaffold.reading import read_source

    read_source(directory)


def run_targets() -> Iterator[Target]:
    """Yields the targets of this file."""
    run = "name/20260101-000000"
    state = [f"{run}/checkpoints/m-3-96/{name}" for name in ("state.json", "model.safetensors")]
    kept = ["job.json", "stages/train.json", "metrics.jsonl", "answers.jsonl"]
    yield Target("data", ("data.jsonl",), lambda d: _lines(d / "data.jsonl", _RECORDS), _read_data)
    yield Target(
        "problems",
        ("problems.jsonl",),
        lambda d: _lines(d / "problems.jsonl", _PROBLEMS),
        _read_problems,
    )
    yield Target("settings", ("job.json", "job.yaml", "job.toml"), _make_settings, _read_settings)
    yield Target(
        "run", tuple(f"{run}/{name}" for name in kept) + tuple(state), _make_run, _read_run
    )
    yield Target("imported", ("import.json",), _make_imported, _read_imported)
    records = ("weights/.metadata", "weights/.metadata", "weights/__0_0.distcp")
    yield Target("torch-dist", records, _make_imported, _read_torch_dist, slow=True)
    weights = ("config.json", "model.safetensors")
    yield Target("cast", weights, _make_cast, _read_cast)
    yield Target(
        "index-names",
        ("model.safetensors.index.json",),
        _make_index,
        _read_index_names,
    )
    yield Target("new-plugin", ("config.json",), _make_random, _read_new_plugin, slow=True)
