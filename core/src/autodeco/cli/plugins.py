"""``plugin list`` and ``plugin show``."""

from __future__ import annotations

import dataclasses
import json

import click


@click.group("plugin")
def plugin_group() -> None:
    """See which plugins are installed.

    Example: autodeco plugin list
    """


@plugin_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """List the installed plugins, broken ones included.

    Example: autodeco plugin list --json
    """
    from autodeco.registry import Registry

    rows = [
        {
            "id": row.id,
            "dist": row.dist,
            "version": row.version,
            "presets": [p.name for p in row.plugin.family.presets] if row.plugin else [],
            "error": row.error,
        }
        for row in Registry().rows()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("plugin", "distribution", "presets", "state")
    for row in rows:
        state = f"[red]{escape(str(row['error']))}[/]" if row["error"] else "ok"
        presets = ", ".join(map(str, row["presets"]))  # type: ignore[arg-type]
        table.add_row(str(row["id"]), f"{row['dist']} {row['version']}", presets, state)
    Console().print(table)
    if not rows:
        click.echo("no plugin is installed; for example: pip install autodeco-plugin-<family>")


@plugin_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_plugin(name: str, as_json: bool) -> None:
    """Show a plugin's presets, shapes and layouts.

    Example: autodeco plugin show FAMILY
    """
    from autodeco.registry import Registry

    row = Registry().get(name)
    assert row.plugin is not None
    family = row.plugin.family
    if as_json:
        presets = [
            {
                "name": p.name,
                "architecture": p.architecture,
                "model_ids": p.model_ids,
                "shape": dataclasses.asdict(p.shape),
                "layout": dataclasses.asdict(p.layout),
                "recipe": dict(p.recipe),
            }
            for p in family.presets
        ]
        click.echo(json.dumps({"id": family.id, "title": family.title, "presets": presets}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{family.title} ({row.who})", title_justify="left")
    for column in ("preset", "layers", "width", "experts", "layout", "models"):
        table.add_column(column)
    for p in family.presets:
        sizes = {"tp": p.layout.tensor, "pp": p.layout.pipeline, "ep": p.layout.expert}
        layout = " ".join(f"{k}{v}" for k, v in sizes.items() if v > 1) or "one GPU each"
        models = ", ".join(p.model_ids) or ("built in" if p.checkpoint or p.random else "")
        numbers = (p.shape.num_layers, p.shape.hidden_size, p.shape.num_experts or "")
        table.add_row(p.name, *map(str, numbers), layout, models)
    Console().print(table)
