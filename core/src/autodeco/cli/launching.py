"""``launch``: what each machine of a cluster runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autodeco.cli.options import as_words, given, job_options
from autodeco.cluster.launch import FORMATS

if TYPE_CHECKING:
    from autodeco.cluster.launch import Launch

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command()
@click.option("--nodes", type=_COUNT, required=True, help="Machines. [launch]")
@click.option(
    "--gpus-per-node", type=_COUNT, required=True, help="Processes on each, one a GPU. [launch]"
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="torchrun",
    show_default=True,
    help="torchrun: for each machine; sbatch: for Slurm, requeued until it is done. [launch]",
)
@click.option("--write", type=_PATH, help="Write the script here instead, executable. [launch]")
@click.option(
    "--env-file",
    type=_PATH,
    help="Lines NAME=VALUE to forward (NCCL_, UCX_, GLOO_, ...); of secrets (KEY, TOKEN, SECRET, "
    "PASSWORD in the name) only the name is written. [launch]",
)
@click.option(
    "--signal-seconds",
    type=_COUNT,
    default=300,
    show_default=True,
    help="sbatch: seconds before Slurm's limit at which to checkpoint. [launch]",
)
@click.option("--config", type=_PATH, help="As of `run`; every machine reads it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@job_options
def launch(
    nodes: int,
    gpus_per_node: int,
    format: str,
    write: Path | None,
    env_file: Path | None,
    signal_seconds: int,
    config: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print what each machine runs for a job; all options of `run` are options here.

    The job is resolved and its layout proved possible first; nothing is started.

    Example: autodeco launch --nodes 8 --gpus-per-node 8 --format sbatch --plugin FAMILY --model DIR
    """
    from autodeco.cluster.environment import read_environment_file
    from autodeco.cluster.launch import Launch

    plan, job = _proved(given(options), config, nodes * gpus_per_node)
    words = ["run", *(["--config", str(config)] if config else []), *as_words(given(options))]
    made = Launch(
        nodes,
        gpus_per_node,
        tuple(words),
        f"autodeco: {nodes} x {gpus_per_node} processes, {plan}",
        read_environment_file(env_file) if env_file else (),
        name=job.name or "autodeco",
        on_gpus=job.device != "cpu",
        signal_seconds=signal_seconds,
    )
    _hand_over(made, format, write, plan, as_json)


def _proved(options: dict[str, Any], config: Path | None, ranks: int) -> tuple[str, Any]:
    """Resolves the job and proves that its layout is possible; returns it in words, and the job."""
    from autodeco.registry import Registry
    from autodeco.settings import resolve

    resolved = resolve(options, config, Registry())
    from autodeco.engines.fitting import is_to_be_fitted
    from autodeco.engines.select import choose_engine
    from autodeco.errors import EnvironmentProblem

    family, preset = resolved.resolution.family, resolved.resolution.preset
    what = f"{family.id} {preset.name}"
    if is_to_be_fitted(resolved.job, preset, ranks):
        say = "the layout is chosen when the job starts, by its GPUs' memory: see autodeco plan"
        click.echo(f"remark: {say}", err=True)
        return f"{what}, layout by the memory of the processes", resolved.job
    try:
        engine, layout = choose_engine(
            resolved.job, preset, ranks, family.architecture(preset.architecture)
        )
    except EnvironmentProblem as problem:  # the layout is possible; this machine does not run it
        click.echo(f"remark: {problem.what} here; the machines of the job need it", err=True)
        return what, resolved.job
    return f"{what}, engine {engine}, layout {layout}", resolved.job


def _hand_over(made: Launch, format: str, write: Path | None, plan: str, as_json: bool) -> None:
    script = made.script(format)
    if write is not None:
        from autodeco.files import atomic_write_text

        atomic_write_text(write, script)
        write.chmod(0o755)
    if as_json:
        told: dict[str, Any] = {"format": format, "plan": plan, "script": script}
        told["written"] = str(write) if write is not None else None
        told["forwarded"] = {v.name: v.value for v in made.variables}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(f"{write}: {plan}" if write is not None else script, nl=write is not None)
