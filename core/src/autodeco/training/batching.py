"""From samples to the batches of a step, by arithmetic that does not depend on the rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from autodeco.engines.base import TokenBatch
from autodeco.training.data import Sample


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the order in which an epoch visits its samples: int64 [count]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def steps_per_epoch(count: int, global_batch: int) -> int:
    """Returns the number of global batches of an epoch; the last may be smaller."""
    return -(-count // global_batch)


def global_batch_at(
    step: int, count: int, global_batch: int, seed: int
) -> tuple[int, NDArray[np.int64]]:
    """Returns the epoch of a step (from 0) and the indices of its samples."""
    epoch, index = divmod(step, steps_per_epoch(count, global_batch))
    order = epoch_order(count, seed, epoch)
    return epoch, order[index * global_batch : (index + 1) * global_batch]


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups sequences into microbatches of at most `max_tokens` padded tokens.

    Sequences of like length go together, so that little is padded; one that is longer than
    `max_tokens` stands alone.

    Returns:
        Lists of indices into `lengths`, longest sequences first.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # the first of a group is its longest
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def shard(
    groups: Sequence[list[int]], lengths: Sequence[int], world_size: int, rank: int
) -> list[list[int]]:
    """Returns this rank's microbatches, the work (padded tokens) spread evenly."""
    load = [0] * world_size
    mine: list[list[int]] = []
    for group in sorted(groups, key=lambda g: -len(g) * lengths[g[0]]):
        to = load.index(min(load))
        load[to] += len(group) * lengths[group[0]]
        if to == rank:
            mine.append(group)
    return mine


def pack(samples: Sequence[Sample]) -> TokenBatch:
    """Packs whole samples flat, on the CPU."""
    lengths = [len(sample.ids) for sample in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenBatch(
        ids=torch.from_numpy(np.concatenate([s.ids for s in samples]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        predict=torch.from_numpy(np.concatenate([s.predict for s in samples])),
        sample_id=torch.from_numpy(np.repeat([s.id for s in samples], lengths)),
    )


def microbatches(
    samples: Sequence[Sample], max_tokens: int, *, world_size: int = 1, rank: int = 0
) -> list[TokenBatch]:
    """Returns this rank's share of a global batch.

    Args:
        samples: The global batch, the same on every rank.
        max_tokens: Padded tokens of one microbatch.
        world_size: Data-parallel ranks.
        rank: This one.
    """
    lengths = [len(sample.ids) for sample in samples]
    groups = shard(group_by_length(lengths, max_tokens), lengths, world_size, rank)
    return [pack([samples[i] for i in group]) for group in groups]
