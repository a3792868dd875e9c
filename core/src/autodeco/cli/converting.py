"""``cast`` and ``verify``: checkpoints in another storage format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from autodeco.storage import StorageFormat

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


def add_conversion_commands(group: click.Group) -> None:
    """Adds the commands that convert checkpoints, and compare them."""
    for command in (cast, verify):
        group.add_command(command)


@click.command()
@click.option("--input", "source", type=_PATH, required=True, help="An FP8 or MXFP4 checkpoint.")
@click.option("--output", type=_PATH, required=True, help="The bfloat16 checkpoint to write.")
@click.option("--plugin", help="Has the storage format; default: found by config.json.")
@click.option("--device", default="cpu", show_default=True, help="Decodes: cpu, cuda or cuda:N.")
@click.option("--workers", type=_COUNT, help="Threads; default: one more than processors, <= 8.")
@click.option("--dry-run", is_flag=True, help="Plan from the headers alone and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cast(
    source: Path,
    output: Path,
    plugin: str | None,
    device: str,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write an FP8 or MXFP4 checkpoint in bfloat16, for tools that need it.

    No command of autodeco needs it: each decodes as it reads.

    Example: autodeco cast --input MODEL --output MODEL-bf16
    """
    from rich.console import Console

    from autodeco.convert.cast_plan import plan_cast
    from autodeco.convert.casting import cast_checkpoint, describe
    from autodeco.stopping import stop_at_once

    who, formats = _formats(plugin, source)
    if dry_run:
        plan = plan_cast(source, formats, who=who)
    else:
        from autodeco.engines.select import choose_device

        with stop_at_once():
            plan = cast_checkpoint(
                source,
                output,
                formats=formats,
                who=who,
                device=str(choose_device(device)),
                workers=workers,
                console=Console(stderr=True),
            )
    values = {
        "output": str(output),
        "written": not dry_run,
        "decoded": plan.decoded,
        "copied": plan.count - plan.decoded,
        "read_bytes": plan.read_size,
        "written_bytes": plan.size,
        "files": len(plan.shards),
        "left_out": [str(file) for file in plan.left_out],
    }
    _say(as_json, f"{output}: {'planned, ' if dry_run else ''}{describe(plan)}", values)


@click.command()
@click.option(
    "--input",
    "converted",
    type=_PATH,
    required=True,
    help="A cast, an import, or an exported backbone.",
)
@click.option("--model", type=_PATH, required=True, help="The checkpoint that it was made from.")
@click.option("--plugin", help="Of the checkpoint; default: found by its config.json.")
@click.option("--preset", help="Of the checkpoint; default: found by its config.json.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    converted: Path, model: Path, plugin: str | None, preset: str | None, as_json: bool
) -> None:
    """Compare a converted checkpoint with its source, tensor by tensor, byte by byte.

    Example: autodeco verify --input MODEL-bf16 --model MODEL
    """
    from rich.console import Console

    from autodeco.convert.cast_plan import plan_cast
    from autodeco.convert.casting import MANIFEST as CAST
    from autodeco.convert.source import open_source
    from autodeco.convert.stored import MANIFEST
    from autodeco.convert.verification import compare_cast, compare_import
    from autodeco.job import Job
    from autodeco.registry import Registry
    from autodeco.stopping import stop_at_once

    console = Console(stderr=True)
    imported, cast_of = (converted / MANIFEST).exists(), (converted / CAST).exists()
    with stop_at_once():
        if cast_of:  # whatever the family
            who, formats = _formats(plugin, model)
            plan = plan_cast(model, formats, who=who)
            compared = compare_cast(plan, converted, formats, console=console)
        else:
            found = Registry().resolve(plugin, model, preset)
            job = Job(plugin=found.family.id, preset=found.preset.name, model=model)
            source = open_source(found.family, job)
            if imported:
                compared = compare_import(source, converted, console=console)
            else:
                plan = plan_cast(model, source.formats, who=found.row.who, may_be_plain=True)
                dropped = source.weight_map.dropped
                compared = compare_cast(
                    plan, converted, source.formats, dropped=dropped, console=console
                )
    text = (
        f"{converted}: {compared.tensors:,} tensors ({compared.size:,} bytes) are those of {model}"
        f", {compared.decoded:,} of which are stored in parts there"
    )
    _say(as_json, text, {"input": str(converted), "equal": True, **vars(compared)})


def _formats(plugin: str | None, source: Path) -> tuple[str, tuple[StorageFormat, ...]]:
    """The storage formats of the named plugin, or of those that know the architecture."""
    from autodeco.registry import Registry
    from autodeco.resolution import architecture_of, read_config

    registry = Registry()
    if plugin is not None:
        row = registry.get(plugin)
        assert row.plugin is not None
        return row.who, row.plugin.family.formats
    name = architecture_of(read_config(source))
    known = {
        row.who: row.plugin.family.formats
        for row in registry.rows()
        if row.plugin is not None
        and any(one.name == name for one in row.plugin.family.architectures)
    }
    return ", ".join(known), tuple(one for formats in known.values() for one in formats)


def _say(as_json: bool, text: str, values: dict[str, Any]) -> None:
    click.echo(json.dumps(values, indent=2) if as_json else text)
