"""``plugin new``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("new")
@click.argument("name")
@click.option(
    "--from",
    "begin",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="A Hugging Face directory, or a config.json.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the new package.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def new_plugin(name: str, begin: Path, out: Path | None, as_json: bool) -> None:
    """Write a plugin's package for a family, begun from a model's config.json.

    What its author must fill in is marked TODO(author).

    Example: autodeco plugin new my_family --from My-Model-7B
    """
    from autodeco.scaffold.writing import new_plugin as write

    written = write(name, begin, out)
    proposal = written.plugin.proposal
    if as_json:
        told = {
            "path": str(written.path),
            "plugin": name,
            "preset": written.plugin.preset,
            "blocks": [block.name for block in proposal.blocks],
            "rules": len(proposal.rules),
            "left": {item.name: item.shape for item in proposal.left},
            "resembles": proposal.resembles[0],
            "trial": dict(written.trial),
            "todo": dict(written.todo),
        }
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"wrote {written.path}")
    if 2 * proposal.resembles[1] > proposal.total:
        click.echo(
            f"  {proposal.resembles[1]} of {proposal.total} tensors are named as in "
            f"{proposal.resembles[0]}"
        )
    blocks = ", ".join(block.name for block in proposal.blocks)
    click.echo(f"  blocks: {blocks}; {len(proposal.rules)} single rules; {len(proposal.left)} open")
    for check, found in written.trial.items():
        click.echo(f"  {check}: {found}")
    for place, line in written.todo.items():
        click.echo(f"  {place}: {line}")
    click.echo(
        f"next: pip install -e {written.path}, fill in what is marked TODO(author), then "
        f"autodeco plugin check {name}"
    )
