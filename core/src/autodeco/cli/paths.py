"""export, merge and evaluate on paths: no run, no plugin; options have the names of the job's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from autodeco.errors import UsageError
from autodeco.job import Job
from autodeco.job_values import coerce_values


def export(
    options: Mapping[str, Any], as_json: bool, *, output: Path | None, input: Path | None
) -> None:
    """Writes the heads of a checkpoint as a heads directory."""
    values = _values(options, "checkpoint", "save_dtype", "temperature_scale", "top_p_scale")
    output, source = _needed("--output", output), _needed("--input", input)
    from autodeco.heads.files import load_heads, save_heads
    from autodeco.training.checkpoint import STATE, find_checkpoint

    if not (source / STATE).exists():
        folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
        source = find_checkpoint(folder, values["checkpoint"])
    loaded = load_heads(source)
    dial = {name: values[name] for name in ("temperature_scale", "top_p_scale") if name in options}
    metadata = {**loaded.metadata, **dial, "checkpoint": source.name}
    save_heads(output, loaded.heads, metadata=metadata, dtype=values["save_dtype"])
    _say(as_json, f"{output} from {source}", output=output, checkpoint=source)


def merge(
    options: Mapping[str, Any], as_json: bool, *, output: Path | None, heads_dir: Path | None
) -> None:
    """Joins a base checkpoint and heads in one directory."""
    values = _values(options, "model", "merge", "copy")
    output, heads = _needed("--output", output), _needed("--heads-dir", heads_dir)
    base = _needed("--model", values["model"])
    if values["merge"] == "none":
        raise UsageError("--merge none merges nothing", fix="choose native or autodeco")
    from autodeco.heads.merge import merge as merge_files

    report = merge_files(base, heads, output, layout=values["merge"], copy=values["copy"])
    _say(as_json, f"{output}: {report.describe()}", output=output, made=report.describe())


def evaluate(
    options: Mapping[str, Any], as_json: bool, *, output: Path | None, heads_dir: Path | None
) -> None:
    """Evaluates a merged checkpoint, or a base checkpoint with or without heads."""
    names = ("model", "problems", "device", "max_new_tokens", "problem_format", "answer_check")
    counts = ("evaluate_problems", "evaluate_samples", "evaluate_seed")
    values = _values(options, *names, *counts, "chat_template_kwargs")
    model = _needed("--model", values["model"])
    problems = _needed("--problems", values["problems"])
    output = _needed("--output", output)
    from rich.console import Console

    from autodeco.decoding.command import evaluate_checkpoint

    console = Console(stderr=as_json)
    outcome = evaluate_checkpoint(
        model=model,
        heads=heads_dir,
        problems=problems,
        output=output,
        console=console,
        limit=values["evaluate_problems"],
        samples=values["evaluate_samples"],
        max_new_tokens=values["max_new_tokens"],
        seed=values["evaluate_seed"],
        device=values["device"],
        problem_format=values["problem_format"],
        method=values["answer_check"],
        chat_template_kwargs=values["chat_template_kwargs"],
    )
    if as_json:
        click.echo(json.dumps(outcome.results, indent=2))
        return
    console.print(outcome.table)
    console.print(f"report: {outcome.report}", highlight=False)


def _values(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The options that a command on paths knows, with the job's defaults."""
    for name in options:
        if name not in names:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect together with --output",
                fix="leave it out; with --output this command knows "
                + ", ".join("--" + n.replace("_", "-") for n in names),
            )
    defaults, known = Job(), coerce_values(options, where="command line")
    return {name: known.get(name, getattr(defaults, name)) for name in names}


def _needed(option: str, value: Path | None) -> Path:
    if value is None:
        raise UsageError(f"{option} is missing", fix=f"give {option} a path")
    return value


def _say(as_json: bool, text: str, **values: Any) -> None:
    plain = {name: str(value) for name, value in values.items()}
    click.echo(json.dumps(plain, indent=2) if as_json else text)
