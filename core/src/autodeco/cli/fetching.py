"""``fetch``: a checkpoint from the hub."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit; default: the default branch.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Directory to appear when all is there; default: the hub's cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fetch(model: str, revision: str | None, output: Path | None, as_json: bool) -> None:
    """Fetch a checkpoint from the hub: weights in safetensors, config, tokenizer; no code.

    Prints the directory, which --model takes. Run again, it goes on with what is missing and
    compares what is there with the hub's checksums. HF_TOKEN, HF_HOME, HF_ENDPOINT and
    HF_HUB_OFFLINE are respected.

    Example: autodeco fetch OWNER/MODEL --output DIR
    """
    from rich.console import Console

    from autodeco.convert.fetch import fetch as fetch_model

    done = fetch_model(model, revision=revision, output=output, console=Console(stderr=True))
    click.echo(json.dumps(done.to_json(), indent=2) if as_json else str(done.path))
