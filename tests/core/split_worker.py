"""One tensor rank of `test_objective_split`: the objective over its slice, against the whole."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from autodeco.engines.base import HiddenBatch, OutputWeight
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums

TOKENS, HIDDEN, VOCABULARY = 96, 12, 1536
SPREADS = {"flat": 0.1, "usual": 2.0, "peaked": 12.0}


def batch(kind: str) -> tuple[HiddenBatch, torch.Tensor]:
    """States on a coarse grid (so that logits are tied and exact), labels of every kind."""
    g = torch.Generator().manual_seed(0)
    h = (torch.randn(TOKENS, HIDDEN, generator=g) * 2).round() / 2
    w = (torch.randn(VOCABULARY, HIDDEN, generator=g) * 4).round() / 4
    w = w * SPREADS[kind] / 3.5
    z = h @ w.T
    label = torch.multinomial(z.softmax(-1), 1, generator=g)[:, 0]
    label[::3] = z.argmax(-1)[::3]
    label[1::3] = torch.randint(0, VOCABULARY, (len(label[1::3]),), generator=g)
    index = torch.arange(TOKENS)
    return HiddenBatch(h, label, index // 24, index % 24), w


def run(heads: DecodingHeads, hidden: HiddenBatch, output: OutputWeight, variant: str) -> Any:
    mine = copy.deepcopy(heads)
    arguments: dict[str, Any] = {"seed": 3, "epoch": 1, "backward": True, "chunk_tokens": 40}
    sums = objective_sums(mine, hidden, output, OBJECTIVES[variant], **arguments)
    gradient = torch.cat([p.grad.flatten() for p in mine.parameters() if p.grad is not None])
    return dataclasses.asdict(sums), gradient


def main() -> None:
    meeting, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    rows = VOCABULARY // world
    report = {}
    for kind in SPREADS:
        hidden, w = batch(kind)
        for variant in sorted(OBJECTIVES):
            heads = DecodingHeads(HeadsConfig(HIDDEN), torch.Generator().manual_seed(1))
            whole = OutputWeight(w, 0, VOCABULARY)
            part = OutputWeight(
                w[rank * rows : (rank + 1) * rows], rank * rows, VOCABULARY, dist.group.WORLD
            )
            sums, gradient = run(heads, hidden, whole, variant)
            other_sums, other = run(heads, hidden, part, variant)
            everyone = [torch.empty_like(other) for _ in range(world)]
            dist.all_gather(everyone, other)
            report[f"{kind} {variant}"] = {
                "sums": sums,
                "split": other_sums,
                "gradient": float((gradient - other).norm() / gradient.norm()),
                "same": all(torch.equal(everyone[0], g) for g in everyone),
            }
    if rank == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
