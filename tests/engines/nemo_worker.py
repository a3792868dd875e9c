"""One rank that saves a model as NeMo 2 does: `nemo_worker.py JSON`, with RANK and WORLD_SIZE set.

megatron-core's own `dist_checkpointing.save` writes it: NeMo calls the same function on the same
model classes, and adds the adapter's tensors. See the options for what else it can do as NeMo does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file

from autodeco.convert.source import open_source
from autodeco.engines.select import build_engine
from autodeco.job import Job


def pad_vocabulary(entry: ShardedTensor, rows: int) -> ShardedTensor:
    """Appends rows, as for a vocabulary that is divided by ranks; for one rank."""
    data = torch.cat([entry.data, torch.full((rows, entry.data.shape[1]), 9.0).to(entry.data)])
    shape = (entry.global_shape[0] + rows, *entry.global_shape[1:])
    changes = {"data": data, "local_shape": tuple(data.shape), "global_shape": shape}
    return dataclasses.replace(entry, **changes)


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # megatron-core's save
    if world > 1:
        meeting = f"file://{options['meeting']}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    family = import_module(f"autodeco_plugin_{options['family']}.family").FAMILY
    path, preset = Path(options["model"]), family.preset(options["preset"])
    job = Job(
        plugin=family.id,
        preset=preset.name,
        model=path,
        device="cpu",
        engine="megatron",
        dtype="float32",
        layout=options["layout"],
    )
    engine: Any = build_engine(job, open_source(family, job), family)
    state = engine._model.sharded_state_dict(prefix="module.")
    for name, entry in state.items():
        # as with Transformer Engine, which keeps norms within products
        entry.key = options["names"].get(entry.key, entry.key)
        by_vocabulary = entry.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        if options["padding"] and by_vocabulary:
            state[name] = pad_vocabulary(entry, options["padding"])
    for name, tensor in load_file(options["heads"]).items():
        key = f"module.adapter.{name}"
        state[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=rank)
    dist_checkpointing.save(state, options["output"])
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
