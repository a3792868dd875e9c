"""``plan``: what a run needs on GPUs that are not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autodeco.errors import UsageError

if TYPE_CHECKING:
    from autodeco.engines.megatron.layouts import Search
    from autodeco.engines.megatron.plan import LayoutPlan, Request

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
_REFUSED_SHOWN = 12
_WIDTH = 100  # of the table of ranks, also where no terminal is that wide
_PARTS = {
    "weights": "weights",
    "heads": "heads",
    "forward": "forward",
    "pipe": "pipeline",
    "object.": "objective",
}


@click.command()
@click.option("--plugin", help="Plugin: a family's id or alias.")
@click.option(
    "--preset", help="Preset of the family, or auto: --model's sizes; default: that of --model."
)
@click.option("--model", type=_PATH, help="Checkpoint directory, or its config.json alone.")
@click.option("--index", type=_PATH, help="model.safetensors.index.json, for its tensor names.")
@click.option("--layout", help="As tp=2,pp=2,ep=8; default: look for those that fit.")
@click.option("--gpus", type=_COUNT, required=True, help="GPUs of the run, one rank each.")
@click.option("--gpu-memory", type=float, required=True, help="GiB of one GPU.")
@click.option("--reserve", type=float, default=4.0, show_default=True, help="GiB kept free on it.")
@click.option("--micro-batch-tokens", type=_COUNT, help="Tokens at once; default: train's.")
@click.option("--max-length", type=_COUNT, help="Longest sample; default: the preset's.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the backbone; auto: as config.json says, else bfloat16.",
)
@click.option(
    "--objective",
    type=click.Choice(["nll", "megatron", "hf", "paper"]),
    default="nll",
    show_default=True,
    help="Training objective.",
)
@click.option("--limit", type=_COUNT, default=3, show_default=True, help="Layouts to find.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(as_json: bool, layout: str | None, limit: int, **options: Any) -> None:
    """Plan a run on a cluster, on a laptop: no weights and no GPU are needed.

    With --layout, every rank's layers, parameters and memory, and the proof that each tensor of the
    checkpoint lands once in every copy of the model. Without it, the layouts that fit, best first:
    the fewest ranks on a token (pp * max(tp, ep)), then the least tensor-, expert- and
    pipeline-parallel talk.

    Example: autodeco plan --plugin FAMILY --preset SIZE --gpus 64 --gpu-memory 80
    """
    from autodeco.engines.fitting import require_planner

    require_planner("autodeco plan")
    from autodeco.engines.megatron.layouts import find_layouts
    from autodeco.engines.megatron.plan import plan_layout
    from autodeco.layout import ParallelLayout

    request = _request(**options)
    if layout is not None:
        planned = plan_layout(request, ParallelLayout.parse(layout))
        if as_json:
            click.echo(json.dumps(_head(request) | _layout_json(planned), indent=2))
        else:
            _print_layout(request, planned)
        return
    found = find_layouts(request, limit)
    if as_json:
        click.echo(json.dumps(_head(request) | _search_json(found), indent=2))
    else:
        _print_search(request, found)


def _request(
    *,
    plugin: str | None,
    preset: str | None,
    model: Path | None,
    index: Path | None,
    gpus: int,
    gpu_memory: float,
    reserve: float,
    micro_batch_tokens: int | None,
    max_length: int | None,
    dtype: str,
    objective: str,
) -> Request:
    import torch

    from autodeco.engines.megatron.plan import GIB
    from autodeco.engines.megatron.requests import request_for
    from autodeco.engines.select import choose_dtype
    from autodeco.registry import Registry

    if not 0 <= reserve < gpu_memory:
        raise UsageError(
            f"--reserve {reserve:g} leaves nothing of --gpu-memory {gpu_memory:g}",
            fix="give both in GiB, the reserve smaller",
        )
    if model is not None and model.name == "config.json":
        model = model.parent
    resolved = Registry().resolve(plugin, model, preset)
    if index is None and model and (model / "model.safetensors.index.json").exists():
        index = model / "model.safetensors.index.json"
    if dtype == "auto" and model is None:
        dtype = "bfloat16"
    return request_for(
        resolved.family,
        resolved.preset,
        model,
        index,
        gpus=gpus,
        gpu_memory=round(gpu_memory * GIB),
        reserve=round(reserve * GIB),
        dtype=choose_dtype(dtype, model or Path(), torch.device("cuda")),
        micro_batch_tokens=micro_batch_tokens,
        max_length=max_length,
        objective=objective,
    )


def _head(request: Request) -> dict[str, Any]:
    from autodeco.engines.megatron.memory import ASSUMED
    from autodeco.engines.megatron.plan import NOT_MODELLED

    rows, length = request.microbatch
    return {
        "gpus": request.gpus,
        "gpu_memory": request.gpu_memory,
        "reserve": request.reserve,
        "dtype": str(request.dtype).removeprefix("torch."),
        "objective": request.objective,
        "microbatch": {"rows": rows, "length": length},
        "assumed": ASSUMED,
        "not_modelled": NOT_MODELLED,
    }


def _layout_json(planned: LayoutPlan) -> dict[str, Any]:
    return {
        "layout": str(planned.layout),
        "data_ranks": planned.data_ranks,
        "fits": planned.fits,
        "peak": planned.largest.memory.peak,
        "verdict": planned.verdict(),
        "ranks": [{**dataclasses.asdict(rank), "peak": rank.memory.peak} for rank in planned.ranks],
        "landing": dataclasses.asdict(planned.landing) if planned.landing else None,
    }


def _search_json(found: Search) -> dict[str, Any]:
    from autodeco.engines.megatron.layouts import reason_of

    return {
        "fitting": [{**_layout_json(p), "reason": reason_of(p.layout)} for p in found.fitting],
        "refused": [{"layout": str(r.layout), "reason": r.reason} for r in found.refused],
        "unseen": found.unseen,
    }


def _print_layout(request: Request, planned: LayoutPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    from autodeco.engines.megatron.plan import GIB

    console = Console()
    table = Table(box=None, padding=(0, 1), title_justify="left")
    table.title = f"layout {planned.layout}, {request.gpus} GPUs; bytes in GiB"
    for title in ("ranks", "pp", "tp", "ep", "layers", "params B", *_PARTS, "peak"):
        table.add_column(title, justify="left" if title == "layers" else "right", no_wrap=True)
    for row in _rows(planned):
        rank, memory = row.plan, row.plan.memory
        ends = ("emb+" if rank.embedding else "", "+out" if rank.output else "")
        layers = f"{ends[0]}{rank.layers[0]}-{rank.layers[1]}{ends[1]}"
        sizes = [f"{getattr(memory, part) / GIB:.2f}" for part in (*_PARTS.values(), "peak")]
        count = f"{rank.parameters / 1e9:.3f}"
        table.add_row(row.ranks, str(rank.stage), row.tensor, row.expert, layers, count, *sizes)
    Console(width=max(_WIDTH, console.width)).print(table)
    say = click.echo
    alike = request.gpus // len(planned.ranks)
    say(f"{len(planned.ranks)} distinct ranks x {alike} alike (data and context parallel); "
        f"{planned.data_ranks} shares of the data")  # fmt: skip
    landing = planned.landing
    assert landing is not None
    copies = f"{landing.copies} copies"
    if landing.expert_copies:
        copies += f", the experts' in each of {landing.expert_copies}"
    say(f"all {landing.tensors} tensors ({landing.elements / 1e9:.3f} B elements) land once in "
        f"each of {copies}")  # fmt: skip
    say(f"  {landing.split} parameters in slices, {landing.replicated} whole on all ranks of a "
        f"stage; {landing.dropped} tensors of the checkpoint left out")  # fmt: skip
    say(f"{'fits' if planned.fits else 'DOES NOT FIT'}: {planned.verdict()}")
    _print_foot(request)


@dataclasses.dataclass
class _Row:
    plan: Any
    ranks: str
    tensor: str
    expert: str


def _rows(planned: LayoutPlan) -> list[_Row]:
    """Joins the ranks of a stage that differ in their place alone."""
    groups: dict[Any, list[Any]] = {}
    for rank in planned.ranks:
        groups.setdefault((rank.stage, rank.parameters, rank.memory), []).append(rank)
    rows = []
    for members in groups.values():
        ranks = sorted(number for rank in members for number in rank.ranks)
        tensor = [rank.place.tensor for rank in members]
        expert = [rank.place.expert for rank in members]
        rows.append(_Row(members[0], _span(ranks), _span(tensor), _span(expert)))
    return rows


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _print_search(request: Request, found: Search) -> None:
    from autodeco.engines.megatron.layouts import reason_of

    if found.fitting:
        click.echo(f"layouts that fit {request.gpus} GPUs, best first:")
    else:
        click.echo("no layout fits: take more GPUs, or a smaller --micro-batch-tokens")
    for number, planned in enumerate(found.fitting, 1):
        click.echo(f"  {number}. {planned.layout}, {planned.data_ranks} shares of the data")
        click.echo(f"     {reason_of(planned.layout)}")
        click.echo(f"     {planned.verdict()}")
    if found.refused:
        click.echo("refused, in the same order:")
    for refused in found.refused[:_REFUSED_SHOWN]:
        click.echo(f"  {refused.layout}: {refused.reason}")
    if len(found.refused) > _REFUSED_SHOWN:
        click.echo(f"  and {len(found.refused) - _REFUSED_SHOWN} more: --json has them all")
    if found.unseen:
        click.echo(f"{found.unseen} further layouts come after these by the rule: --limit")
    _print_foot(request)


def _print_foot(request: Request) -> None:
    head = _head(request)
    batch = head["microbatch"]
    click.echo(
        f"microbatch [{batch['rows']}, {batch['length']}], {head['dtype']}, objective "
        f"{head['objective']}; reserve {request.reserve / 2**30:g} GiB of "
        f"{request.gpu_memory / 2**30:g}"
    )
    for title, key in (("assumed", "assumed"), ("not modelled", "not_modelled")):
        click.echo(f"{title}:\n" + "\n".join(f"  - {line}" for line in head[key]))
