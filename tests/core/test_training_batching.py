"""Batches: each sample once an epoch, the same on any number of ranks and after any resume."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco.engines.padding import lay_end_to_end
from autodeco.training import batching
from autodeco.training.batching import (
    epoch_order,
    global_batch_at,
    group_by_length,
    group_to_fill,
    microbatches,
    pack,
    shard,
    steps_per_epoch,
)
from autodeco.training.data import Sample

quick = settings(max_examples=60, deadline=None)
COUNT, BATCH = st.integers(1, 60), st.integers(1, 20)
SEED, EPOCH = st.integers(0, 2**40), st.integers(0, 9)
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)
LIMIT, WORLD = st.integers(1, 120), st.integers(1, 7)


def samples_of(lengths: list[int]) -> list[Sample]:
    """Samples with ids that tell them and their tokens apart."""
    made = []
    for number, length in enumerate(lengths):
        predict = np.zeros(length, dtype=np.bool_)
        predict[length // 2 : -1] = True
        ids = np.arange(length, dtype=np.int32) + 1000 * number
        made.append(Sample(10 + number, ids, predict, number + 1))
    return made


@quick
@given(COUNT, BATCH, SEED, EPOCH)
def test_an_epoch_visits_every_sample_once(count: int, size: int, seed: int, epoch: int) -> None:
    steps = steps_per_epoch(count, size)
    seen = [global_batch_at(epoch * steps + i, count, size, seed) for i in range(steps)]
    assert {e for e, _ in seen} == {epoch}
    assert sorted(np.concatenate([batch for _, batch in seen]).tolist()) == list(range(count))
    assert all(len(batch) == size for _, batch in seen[:-1]) and 0 < len(seen[-1][1]) <= size


@quick
@given(COUNT, BATCH, SEED, st.integers(0, 40), st.integers(0, 40))
def test_a_resume_at_any_step_gives_the_same_batches(
    count: int, size: int, seed: int, stop: int, more: int
) -> None:
    through = [global_batch_at(i, count, size, seed) for i in range(stop + more)]
    np.random.default_rng(0).random(stop)  # nothing is drawn from a stream
    resumed = [global_batch_at(i, count, size, seed) for i in range(stop, stop + more)]
    for (epoch, batch), (epoch_again, again) in zip(through[stop:], resumed, strict=True):
        assert epoch == epoch_again and batch.tolist() == again.tolist()


def test_the_order_is_written_down() -> None:
    """Another order would make a run that is resumed by a newer version another run."""
    assert epoch_order(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert epoch_order(8, 3, 1).tolist() == [0, 7, 6, 1, 5, 3, 2, 4]


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25 and tuple(range(50)) not in orders


def test_first_places_are_uniform_over_epochs() -> None:
    first = Counter(int(epoch_order(5, 1, epoch)[0]) for epoch in range(2000))
    assert max(abs(first[i] - 400) for i in range(5)) < 80  # 4.5 standard deviations


@pytest.mark.parametrize(("count", "size", "steps"), [(1, 1, 1), (10, 5, 2), (11, 5, 3), (3, 8, 1)])
def test_steps_of_an_epoch(count: int, size: int, steps: int) -> None:
    assert steps_per_epoch(count, size) == steps


@quick
@given(LENGTHS, LIMIT)
def test_groups_partition_and_respect_the_limit(lengths: list[int], limit: int) -> None:
    groups = group_by_length(lengths, limit)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= limit or len(group) == 1
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@quick
@given(LENGTHS, LIMIT)
def test_no_two_neighbouring_groups_could_be_one(lengths: list[int], limit: int) -> None:
    for first, second in itertools.pairwise(group_by_length(lengths, limit)):
        assert (len(first) + 1) * max(lengths[i] for i in first) > limit, (first, second)


@quick
@given(LENGTHS, LIMIT)
def test_packed_groups_partition_respect_the_limit_and_leave_no_room(
    lengths: list[int], limit: int
) -> None:
    groups = group_to_fill(lengths, limit)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    for number, later in enumerate(groups):  # what opened a group fitted into none before it
        assert all(size + lengths[later[0]] > limit for size in sizes[:number])


@quick
@given(LENGTHS, LIMIT, WORLD)
def test_packed_microbatches_partition_the_global_batch(
    lengths: list[int], limit: int, world: int
) -> None:
    samples = samples_of(lengths)
    ranks = [
        microbatches(samples, limit, world_size=world, rank=rank, packed=True)
        for rank in range(world)
    ]
    found = [int(token) for batch in itertools.chain(*ranks) for token in batch.ids]
    assert sorted(found) == sorted(int(t) for sample in samples for t in sample.ids)
    loads = [sum(len(batch.ids) for batch in batches) for batches in ranks]
    largest = max(len(batch.ids) for batch in itertools.chain(*ranks))
    assert max(loads) - min(loads) <= largest
    for batch in itertools.chain(*ranks):
        assert len(batch.ids) <= limit or len(batch.cu_seqlens) == 2


@quick
@given(LENGTHS, LIMIT, WORLD, st.booleans(), st.integers(2, 8))
def test_a_pipeline_gets_the_same_samples_in_microbatches_no_larger(
    lengths: list[int], limit: int, world: int, packed: bool, stages: int
) -> None:
    samples = samples_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "FEWEST_TOKENS", 8)
        ranks = [
            microbatches(samples, limit, world_size=world, rank=rank, packed=packed, stages=stages)
            for rank in range(world)
        ]
    found = [int(token) for batch in itertools.chain(*ranks) for token in batch.ids]
    assert sorted(found) == sorted(int(t) for sample in samples for t in sample.ids)
    share = -(-sum(lengths) // world)
    largest = min(limit, max(8, -(-share // (batching.MICROBATCHES_A_STAGE * stages))))
    for batch in itertools.chain(*ranks):
        sizes = batch.cu_seqlens.diff()
        cost = len(batch.ids) if packed else len(sizes) * int(sizes.max())
        assert cost <= largest or len(sizes) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_a_pipeline_is_not_left_with_one_microbatch(packed: bool) -> None:
    """A microbatch had been the whole share of a rank, and its stages worked one after another."""
    samples = samples_of([1000] * 64)
    for stages in (2, 4, 8):
        found = microbatches(samples, 100_000, packed=packed, stages=stages)
        assert len(found) >= 2 * stages
    assert len(microbatches(samples, 100_000, packed=packed)) == 1
    few = microbatches(samples[:4], 100_000, packed=packed, stages=8)
    assert [len(batch.ids) for batch in few] == [2000, 2000], "small ones do not fill a GPU"


@pytest.mark.parametrize("room", [0, 3])
def test_sequences_end_to_end_and_their_padding_a_sequence_of_its_own(room: int) -> None:
    batch = pack(samples_of([3, 2]))
    ids, flat, bounds = lay_end_to_end(batch, 5 + room)
    assert ids.tolist() == [[0, 1, 2, 1000, 1001] + [0] * room]
    assert flat.tolist() == [0, 1, 2, 3, 4]
    assert bounds == ((0, 3, 5) if not room else (0, 3, 5, 8))
    ids, flat, bounds = lay_end_to_end(None, 4)
    assert (ids.tolist(), flat.tolist(), bounds) == ([[0] * 4], [], (0, 4))


def test_a_sample_that_is_longer_than_the_limit_goes_alone() -> None:
    assert group_by_length([3, 50, 3, 60], 10) == [[3], [1], [0, 2]]
    batches = microbatches(samples_of([3, 50, 3, 60]), 10)
    assert [len(batch.ids) for batch in batches] == [60, 50, 6]


def test_like_lengths_go_together_so_that_little_is_padded() -> None:
    lengths = np.random.default_rng(0).integers(20, 1000, 256).tolist()
    groups = group_by_length(lengths, 4000)
    padded = sum(len(group) * lengths[group[0]] for group in groups)
    assert padded < 1.06 * sum(lengths)
    in_order = [lengths[i : i + 4] for i in range(0, 256, 4)]
    assert sum(4 * max(group) for group in in_order) > 1.4 * sum(lengths)  # what is avoided


@quick
@given(LENGTHS, LIMIT, WORLD)
def test_ranks_partition_the_global_batch(lengths: list[int], limit: int, world: int) -> None:
    samples = samples_of(lengths)
    ranks = [microbatches(samples, limit, world_size=world, rank=rank) for rank in range(world)]
    found = Counter(
        (int(sample), int(position), int(token), bool(predict))
        for batch in itertools.chain(*ranks)
        for sample, position, token, predict in zip(
            batch.sample_id, batch.positions, batch.ids, batch.predict, strict=True
        )
    )
    alone = Counter(
        (sample.id, position, int(sample.ids[position]), bool(sample.predict[position]))
        for sample in samples
        for position in range(len(sample.ids))
    )
    assert found == alone
    for batch in itertools.chain(*ranks):
        sizes = batch.cu_seqlens.diff()
        assert int(sizes.max()) * len(sizes) <= limit or len(sizes) == 1


@quick
@given(LENGTHS, LIMIT, WORLD)
def test_microbatches_are_the_same_ones_on_any_number_of_ranks(
    lengths: list[int], limit: int, world: int
) -> None:
    samples = samples_of(lengths)
    alone = {tuple(batch.ids.tolist()) for batch in microbatches(samples, limit)}
    spread = [
        tuple(batch.ids.tolist())
        for rank in range(world)
        for batch in microbatches(samples, limit, world_size=world, rank=rank)
    ]
    assert set(spread) == alone and len(spread) == len(alone)


@quick
@given(LENGTHS, LIMIT, WORLD)
def test_work_is_spread_evenly(lengths: list[int], limit: int, world: int) -> None:
    groups = group_by_length(lengths, limit)
    cost = [
        sum(len(group) * lengths[group[0]] for group in shard(groups, lengths, world, rank))
        for rank in range(world)
    ]
    largest = max(len(group) * lengths[group[0]] for group in groups)
    assert max(cost) - min(cost) <= largest  # the greedy bound


def test_pack_is_flat_and_whole() -> None:
    batch = pack(samples_of([3, 2]))
    assert batch.ids.tolist() == [0, 1, 2, 1000, 1001]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.predict.tolist() == [False, True, False, False, False]
    assert batch.sample_id.tolist() == [10, 10, 10, 11, 11]
    assert [t.dtype for t in (batch.ids, batch.positions, batch.sample_id)] == [torch.int64] * 3
    assert batch.cu_seqlens.dtype == torch.int32 and batch.predict.dtype == torch.bool


def test_the_last_token_of_a_sample_predicts_nothing_of_the_next() -> None:
    lengths = list(range(2, 20))
    for batch in microbatches(samples_of(lengths), 64):
        assert not batch.predict[batch.cu_seqlens[1:].long() - 1].any()
        at = batch.predict.nonzero()[:, 0]
        assert torch.equal(batch.sample_id[at], batch.sample_id[at + 1])


def test_the_callers_samples_are_not_shared_with_the_batch() -> None:
    samples = samples_of([4])
    pack(samples).predict[:] = True
    assert samples[0].predict.tolist() == [False, False, True, False]
