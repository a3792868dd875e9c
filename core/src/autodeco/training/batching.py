"""From samples to the batches of a step, by arithmetic that does not depend on the rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from autodeco.engines.base import TokenBatch
from autodeco.training.data import Sample

# A pipeline of p stages stands still for (p - 1) / (m + p - 1) of a step of m microbatches, and
# each microbatch costs something of its own: docs/performance.md has the times.
MICROBATCHES_A_STAGE = 2
FEWEST_TOKENS = 2048


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


def group_to_fill(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups sequences into microbatches of at most `max_tokens` tokens, laid end to end.

    Each goes into the first microbatch that has room, the longest first; one that is longer than
    `max_tokens` stands alone.

    Returns:
        Lists of indices into `lengths`.
    """
    groups: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((n for n, room in enumerate(rooms) if room >= lengths[index]), len(rooms))
        if place == len(rooms):
            groups.append([])
            rooms.append(max_tokens)
        groups[place].append(index)
        rooms[place] -= lengths[index]
    return groups


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
    groups: Sequence[list[int]],
    lengths: Sequence[int],
    world_size: int,
    rank: int,
    *,
    packed: bool = False,
) -> list[list[int]]:
    """Returns this rank's microbatches, the work (tokens, with their padding) spread evenly."""

    def work(group: list[int]) -> int:
        return sum(lengths[i] for i in group) if packed else len(group) * lengths[group[0]]

    load = [0] * world_size
    mine: list[list[int]] = []
    for group in sorted(groups, key=work, reverse=True):
        to = load.index(min(load))
        load[to] += work(group)
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
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    world_size: int = 1,
    rank: int = 0,
    packed: bool = False,
    stages: int = 1,
) -> list[TokenBatch]:
    """Returns this rank's share of a global batch.

    Args:
        samples: The global batch, the same on every rank.
        max_tokens: Tokens of one microbatch, with their padding.
        world_size: Data-parallel ranks.
        rank: This one.
        packed: Sequences are laid end to end, without padding, and a microbatch holds no more than
            a rank's share of the global batch, so that none is left without.
        stages: Pipeline stages; several get microbatches enough to work at the same time, where
            the samples are short enough: none is split.
    """
    lengths = [len(sample.ids) for sample in samples]
    share = -(-sum(lengths) // world_size)
    if stages > 1:
        wanted = -(-share // (MICROBATCHES_A_STAGE * stages))
        max_tokens = min(max_tokens, max(wanted, FEWEST_TOKENS))
    if packed:
        groups = group_to_fill(lengths, min(max_tokens, share))
    else:
        groups = group_by_length(lengths, max_tokens)
    groups = shard(groups, lengths, world_size, rank, packed=packed)
    return [pack([samples[i] for i in group]) for group in groups]
