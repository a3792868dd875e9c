"""The stages on paths, without a run; options have the names of the job's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autodeco.errors import UsageError
from autodeco.job import Job
from autodeco.job_values import coerce_values

if TYPE_CHECKING:
    from autodeco.family import Architecture, FamilySpec


def import_weights(
    options: Mapping[str, Any],
    as_json: bool,
    *,
    output: Path | None,
    format: str | None,
    nemo_python: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Writes a checkpoint in another format; one that is there is verified."""
    values = _values(options, "plugin", "preset", "model", "import_format")
    output = _needed("--output", output)
    if (format or values["import_format"]) == "hf":
        raise UsageError(
            "a Hugging Face checkpoint needs no import: every engine reads it",
            fix="add --format torch_dist, or leave --output out to check the weight map alone",
        )
    from autodeco.cluster.join import joined
    from autodeco.convert.source import built_in_checkpoint
    from autodeco.engines.select import require_megatron
    from autodeco.processes import rank
    from autodeco.registry import Registry

    require_megatron("--format torch_dist needs megatron-core, which is not installed")
    found = Registry().resolve(values["plugin"], values["model"], values["preset"])
    model = values["model"]
    if model is None and found.preset.checkpoint is not None:
        model = built_in_checkpoint(found.family, found.preset, output)
    job = Job(
        plugin=found.family.id,
        preset=found.preset.name,
        model=_needed("--model", model),
        device="cpu",
        import_format="torch_dist",
        import_dir=output,
    )
    architecture = found.family.architecture(found.preset.architecture)
    if nemo_python is not None:
        from autodeco.convert.nemo_context import check_python

        check_python(nemo_python, architecture)
    if dry_run:
        _say_planned(found.family, job, output, as_json)
        return
    existed = output.exists()
    with joined(job):
        found.hooks().import_weights(job=job)
        from autodeco.engines.megatron.importing import verify_checkpoint

        if existed:
            verify_checkpoint(output)
    if rank() == 0:
        done = "was there, and is intact" if existed else f"written from {model}"
        if nemo_python is not None:
            done += "; " + _write_context(nemo_python, job, architecture, found.family)
        _say(as_json, f"{output}: {done}", output=output, model=model, done=done)


def _write_context(python: Path, job: Job, architecture: Architecture, family: FamilySpec) -> str:
    from autodeco.convert.nemo_context import CONTEXT, write_context
    from autodeco.convert.source import open_source

    assert job.model is not None and job.import_dir is not None
    if (job.import_dir / CONTEXT).exists():
        return f"{CONTEXT}/ was there"
    shape = open_source(family, job).shape
    made = write_context(python, Path(job.model), architecture, shape, job.import_dir)
    return f"{CONTEXT}/ written by nemo_toolkit {made['versions']['nemo_toolkit']}"


def _say_planned(family: FamilySpec, job: Job, output: Path, as_json: bool) -> None:
    from autodeco.convert.source import open_source
    from autodeco.engines.megatron.importing import plan_import
    from autodeco.resolution import preset_of

    weights = open_source(family, job)
    plan = plan_import(weights, family.architecture(preset_of(family, job).architecture))
    dropped = len(weights.weight_map.dropped)
    text = (
        f"{output}: planned, {plan.pieces:,} pieces of {plan.keys:,} stored tensors, "
        f"{plan.size:,} bytes in {plan.parts:,} files; {dropped} source tensors dropped"
    )
    _say(as_json, text, output=output, dropped=dropped, **vars(plan))


def export(
    options: Mapping[str, Any],
    as_json: bool,
    *,
    output: Path | None,
    input: Path | None,
    target: str | None,
) -> None:
    """Writes the heads of a checkpoint as a heads directory, or a stored backbone for any tool."""
    from autodeco.cli import exporting

    backbone = target == "hf"
    known = exporting.BACKBONE_OPTIONS if backbone else exporting.HEADS_OPTIONS
    values = _values(options, *known)
    output, source = _needed("--output", output), _needed("--input", input)
    if backbone:
        done = exporting.export_backbone(source, output, values)
        click.echo(json.dumps(done, indent=2, default=str) if as_json else exporting.describe(done))
        return
    dial = {name: values[name] for name in ("temperature_scale", "top_p_scale") if name in options}
    done = exporting.export_heads(source, output, values, dial)
    _say(as_json, f"{output} from {done['checkpoint']}", **done)


def merge(
    options: Mapping[str, Any],
    as_json: bool,
    *,
    output: Path | None,
    heads_dir: Path | None,
    dry_run: bool = False,
) -> None:
    """Joins a base checkpoint and heads in one directory."""
    values = _values(options, "model", "merge", "copy")
    output, heads = _needed("--output", output), _needed("--heads-dir", heads_dir)
    base = _needed("--model", values["model"])
    if values["merge"] == "none":
        raise UsageError("--merge none merges nothing", fix="choose native or autodeco")
    from rich.console import Console

    from autodeco.convert.workers import BytesProgress
    from autodeco.heads.merge import merge as merge_files
    from autodeco.heads.merge import plan_merge

    if dry_run:
        report = plan_merge(base, heads, output, layout=values["merge"], copy=values["copy"])
        planned = f"planned, {report.describe()}"
        _say(as_json, f"{output}: {planned}", output=output, made=planned)
        return
    report = merge_files(
        base,
        heads,
        output,
        layout=values["merge"],
        copy=values["copy"],
        progress=lambda total: BytesProgress(Console(stderr=True), "merge", total),
    )
    _say(as_json, f"{output}: {report.describe()}", output=output, made=report.describe())


def evaluate(
    options: Mapping[str, Any], as_json: bool, *, output: Path | None, heads_dir: Path | None
) -> None:
    """Evaluates a merged checkpoint, or a base checkpoint with or without heads."""
    names = ("model", "problems", "device", "dtype", "answer_check", "log_seconds")
    counts = ("evaluate_problems", "evaluate_samples", "evaluate_seed", "evaluate_rows")
    asked = ("problem_format", "max_new_tokens", "chat_template_kwargs")
    values = _values(options, *names, *counts, *asked)
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
        asked={name: values[name] for name in asked if name in options},
        samples=values["evaluate_samples"],
        seed=values["evaluate_seed"],
        rows_at_once=values["evaluate_rows"],
        log_seconds=values["log_seconds"],
        device=values["device"],
        dtype=values["dtype"],
        method=values["answer_check"],
    )
    if as_json:
        click.echo(json.dumps(outcome.results, indent=2))
        return
    console.print(outcome.table)
    console.print(f"report: {outcome.report}", highlight=False)


def refuse_merged(options: Mapping[str, Any]) -> None:
    """Refuses to evaluate a merged checkpoint as a job, which would add heads to it.

    Raises:
        UsageError: --model is one.
    """
    from autodeco.heads.places import is_merged

    model = options.get("model")
    if model is not None and is_merged(Path(model)):
        raise UsageError(
            "this is a merged checkpoint: it has heads already, and no run to look them up in",
            where=str(model),
            fix="add --output DIR: then it is evaluated as it is, and the report goes there",
        )


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
