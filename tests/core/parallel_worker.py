"""One rank of a tiny training, run as a program by test_training_parallel.py.

Arguments: the directory of the test, the job's changes and further options as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from training_tools import TinyEngine, run_training, tiny_heads, tiny_job

from autodeco.engines.base import HiddenBatch, TokenBatch
from autodeco.errors import StoppedEarly


class Signalled(TinyEngine):
    """Sends itself SIGTERM at the n-th batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def hidden_states(self, batches: Iterable[TokenBatch]) -> Iterator[HiddenBatch | None]:
        for hidden in super().hidden_states(batches):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield hidden


def main(root: Path, changes: dict[str, Any], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        meeting = f"file://{root / options['meeting']}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    directory = root / f"rank{rank}"
    directory.mkdir(exist_ok=True)
    # Every rank begins with other heads and random numbers: rank 0's heads are to win.
    torch.manual_seed(rank)
    heads = tiny_heads(seed=rank)
    batch = options["signal"].get(str(rank)) if "signal" in options else None
    engine = Signalled(batch) if batch else TinyEngine()
    engine.data_rank, engine.data_world = rank, world
    stopped = False
    try:
        run_training(directory, tiny_job(**changes), heads=heads, engine=engine)
    except StoppedEarly:
        stopped = True
    tensors = {name: tensor.detach().clone() for name, tensor in heads.state_dict().items()}
    tensors["stopped"] = torch.tensor(stopped)
    save_file(tensors, root / f"heads{rank}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
