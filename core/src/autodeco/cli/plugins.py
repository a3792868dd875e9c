"""``plugin list``, ``plugin show`` and ``plugin check``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from autodeco.cli.checking import check_plugin

if TYPE_CHECKING:
    from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape


@click.group("plugin")
def plugin_group() -> None:
    """See which plugins are installed, check them, and begin a new one.

    Example: autodeco plugin list
    """


plugin_group.add_command(check_plugin)


@plugin_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """List the installed plugins, broken ones included.

    Example: autodeco plugin list --json
    """
    from autodeco.registry import Registry

    rows = Registry().rows()
    told = [
        {
            "id": row.id,
            "dist": row.dist,
            "version": row.version,
            "title": row.plugin.family.title if row.plugin else "",
            "aliases": list(row.plugin.family.aliases) if row.plugin else [],
            "architectures": [a.name for a in row.plugin.family.architectures]
            if row.plugin
            else [],
            "presets": [p.name for p in row.plugin.family.presets] if row.plugin else [],
            "error": row.error,
        }
        for row in rows
    ]
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("plugin", "distribution", "presets", "state"):
        table.add_column(column, overflow="fold")
    for row in rows:
        state = f"[red]{escape(row.error)}[/]" if row.error else "ok"
        presets = ", ".join(p.name for p in row.plugin.family.presets) if row.plugin else ""
        table.add_row(row.id, f"{row.dist} {row.version}", presets, state)
    Console().print(table)
    if not rows:
        click.echo("no plugin is installed; for example: pip install autodeco-plugin-<family>")


@plugin_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_plugin(name: str, as_json: bool) -> None:
    """Show a plugin's architectures, storage, presets, layouts and recipes.

    Example: autodeco plugin show FAMILY
    """
    from autodeco.registry import Registry

    row = Registry().get(name)
    assert row.plugin is not None
    family = row.plugin.family
    if as_json:
        click.echo(json.dumps(_document(family, row.dist, row.version), indent=2, default=str))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{family.title}[/] ({row.who})", soft_wrap=True)
    if family.aliases:
        console.print("also called " + ", ".join(family.aliases))
    console.print(_architectures(family))
    console.print(_presets(family))
    for preset in family.presets:
        if preset.model_ids:
            console.print(f"{preset.name} is {', '.join(preset.model_ids)}", soft_wrap=True)
    for recipe, presets in _recipes(family).items():
        console.print(f"recipe of {', '.join(presets)}: {recipe or 'the defaults'}")


def _document(family: FamilySpec, dist: str, version: str) -> dict[str, Any]:
    return {
        "id": family.id,
        "title": family.title,
        "dist": dist,
        "version": version,
        "api": family.api,
        "aliases": family.aliases,
        "architectures": [
            {
                "name": a.name,
                "model_type": a.model_type,
                "norms": a.norms,
                "qk_norm": a.qk_norm,
                "required": dict(a.required),
                "config_keys": a.keys(),
                "stored": dict(a.stored),
                "engines": _engines(a),
                "no_megatron": a.no_megatron,
            }
            for a in family.architectures
        ],
        "formats": [one.name for one in family.formats],
        "rules": len(family.weight_map.rules),
        "drops": {drop.pattern: drop.reason for drop in family.weight_map.drops},
        "presets": [
            {
                "name": p.name,
                "architecture": p.architecture,
                "model_ids": p.model_ids,
                "shape": dataclasses.asdict(p.shape),
                "layout": dataclasses.asdict(p.layout),
                "recipe": dict(p.recipe),
                "model": _model(p),
                "task": p.task,
                "config": dict(p.config),
            }
            for p in family.presets
        ],
    }


def _engines(architecture: Architecture) -> list[str]:
    return ["hf"] if architecture.no_megatron else ["hf", "megatron"]


def _model(preset: ModelPreset) -> str:
    """Where the weights of a preset come from when none are given."""
    return "trained" if preset.checkpoint else "random" if preset.random else ""


def _architectures(family: FamilySpec) -> Any:
    from rich.table import Table

    table = Table()
    for column in ("architecture", "model_type", "engines", "stored as", "requires"):
        table.add_column(column, overflow="fold")
    for a in family.architectures:
        engines = ", ".join(_engines(a)) + (f" ({a.no_megatron})" if a.no_megatron else "")
        stored = ", ".join(dict.fromkeys(a.stored.values())) or "plain tensors"
        table.add_row(a.name, a.model_type, engines, stored, _pairs(a.required))
    return table


def _presets(family: FamilySpec) -> Any:
    from rich.table import Table

    table = Table()
    columns = ("preset", "layers", "width", "heads", "inner", "experts", "layout", "gpus")
    for column in (*columns, "built in"):
        table.add_column(column, no_wrap=column == "preset")
    for p in family.presets:
        s = p.shape
        numbers = (s.num_layers, s.hidden_size, f"{s.num_heads}/{s.num_kv_heads}", _inner(s))
        layout = str(p.layout).replace(",", " ")
        table.add_row(
            p.name, *map(str, numbers), _experts(s), layout, str(p.layout.gpus), _model(p)
        )
    return table


def _inner(shape: ModelShape) -> str:
    return " + ".join(str(n) for n in (shape.ffn_size, shape.expert_ffn_size) if n)


def _experts(shape: ModelShape) -> str:
    if not shape.num_experts:
        return ""
    shared = f" + {shape.shared_experts}" if shape.shared_experts else ""
    return f"{shape.experts_per_token} of {shape.num_experts}{shared}"


def _recipes(family: FamilySpec) -> dict[str, list[str]]:
    """Recipe in words -> the presets that have it."""
    found: dict[str, list[str]] = {}
    for preset in family.presets:
        found.setdefault(_pairs(preset.recipe), []).append(preset.name)
    return found


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
