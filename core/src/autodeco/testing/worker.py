"""One of two processes of `autodeco.testing.ranks`.

python -m autodeco.testing.worker ORDER    # RANK and WORLD_SIZE set
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autodeco.engines.base import Engine, HiddenBatch
from autodeco.plugin import FamilyPlugin
from autodeco.registry import PluginRow, Registry
from autodeco.testing.context import Context
from autodeco.testing.logits import TOLERANCE, some_batch


def find_plugin(locator: str) -> PluginRow:
    """Returns the plugin of an id, or, for ``module:name``, an object that is not installed."""
    if ":" not in locator:
        return Registry().get(locator)
    module, _, name = locator.partition(":")
    plugin: FamilyPlugin = getattr(import_module(module), name)
    return PluginRow(plugin.family.id, module, "not installed", plugin, None)


def gathered_logits(engine: Engine, vocabulary: int) -> Tensor | None:
    """Returns the logits [m, V], slices of tensor ranks joined; None off the last stage."""
    output = engine.output_weight()
    found = None
    for hidden in list(engine.hidden_states([some_batch(vocabulary)])):
        if not isinstance(hidden, HiddenBatch):
            continue
        found = hidden.h @ output.weight.T
        if output.group is not None:
            parts = [torch.empty_like(found) for _ in range(dist.get_world_size(output.group))]
            dist.all_gather(parts, found, group=output.group)
            found = torch.cat(parts, dim=-1)
    return found


def compute(context: Context, case: dict[str, Any]) -> dict[str, float]:
    """Returns the largest difference from the reference over all ranks, and its limit."""
    preset = context.family.preset(case["preset"])
    job = context.job(preset, "megatron", Path(case["model"])).replace(layout=case["layout"])
    hooks = context.hooks
    built = hooks.build_model(job=job, weights=hooks.import_weights(job=job))
    found = gathered_logits(built.engine, preset.shape.vocab_size)
    wanted = torch.load(case["reference"], weights_only=True)
    mine = -1.0 if found is None else float((found - wanted).abs().max())
    box: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(box, mine)
    seen = [value for value in box if value != -1.0]
    largest = max(seen) if seen and all(v == v for v in seen) else float("nan")
    return {"difference": largest, "limit": TOLERANCE}


def main() -> None:
    """Goes through the cases of an order; rank 0 writes the report."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    order_file = Path(sys.argv[1])
    order = json.loads(order_file.read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(  # type: ignore[attr-defined]
        "gloo",
        init_method=order["meeting"],
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    context = Context(find_plugin(order["plugin"]), order_file.parent)
    reports = [compute(context, case) for case in order["cases"]]
    if rank == 0:
        Path(order["report"]).write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
