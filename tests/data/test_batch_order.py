"""batch_order.py: every sample exactly as often as asked for, the same for all processes, and weights that add up."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.batch_order import BatchSampler, EpochOrder

ORDERS = st.builds(
    lambda pictures, sizes, seed: EpochOrder(
        np.array([bucket % len(sizes) for bucket, _ in pictures]),
        np.array([repeats for _, repeats in pictures]),
        np.array(sizes),
        seed,
    ),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=30),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(-(2**63), 2**64),
)


def _batches(order, epoch=1, **options):
    sampler = BatchSampler(order, **options)
    sampler.set_epoch(epoch, 0)
    return list(sampler)


def _order(counts, batch_sizes, repeats=1, seed=0):
    """``counts`` images in each bucket."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    return EpochOrder(buckets, np.full(len(buckets), repeats), np.array(batch_sizes), seed)


@given(ORDERS, st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_sample_comes_once_whatever_the_number_of_processes(order, epoch, processes):
    shares = [_batches(order, epoch, process_index=i, num_processes=processes) for i in range(processes)]
    together = [ref for round_of in zip(*shares, strict=True) for ref in round_of if ref.indices]
    alone = _batches(order, epoch)
    assert [(ref.indices, ref.position) for ref in together] == [(ref.indices, ref.position) for ref in alone]
    samples, _ = order.epoch(epoch)
    assert [index for ref in alone for index in ref.indices] == samples.tolist()
    assert [ref.position for ref in alone] == np.cumsum([0, *(len(ref.indices) for ref in alone[:-1])]).tolist()


@given(ORDERS, st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_weights_make_the_mean_over_the_step(order, processes, accumulation):
    """Sum over a step of weight x mean loss, averaged over the processes = mean over the step's samples."""
    losses = np.random.default_rng(0).random(1000)
    shares = [
        _batches(order, process_index=i, num_processes=processes, accumulation=accumulation) for i in range(processes)
    ]
    for start in range(0, len(shares[0]), accumulation):
        refs = [ref for share in shares for ref in share[start : start + accumulation]]
        assert {ref.step for ref in refs} == {start // accumulation}
        weighted = sum(ref.weight * losses[list(ref.indices)].mean() for ref in refs if ref.indices) / processes
        samples = [index for ref in refs for index in ref.indices]
        assert weighted == pytest.approx(losses[samples].mean())


def test_repeats_buckets_and_last_batches():
    order = EpochOrder(np.array([1, 0, 1, 0, 0]), np.array([2, 1, 3, 1, 1]), np.array([2, 4]), 0)
    batches = [ref.indices for ref in _batches(order)]
    assert Counter(index for batch in batches for index in batch) == {0: 2, 1: 1, 2: 3, 3: 1, 4: 1}
    assert sorted(map(len, batches)) == [1, 1, 2, 4]
    assert all(set(batch) <= {0, 2} or set(batch) <= {1, 3, 4} for batch in batches)
    assert (order.num_samples, order.num_batches) == (8, 4)


def test_the_order_follows_seed_and_epoch():
    epochs = {
        (seed, epoch): _order([50, 50], [4, 4], seed=seed).epoch(epoch)[0].tolist()
        for seed in (1, 2)
        for epoch in (1, 2)
    }
    assert len({tuple(samples) for samples in epochs.values()}) == 4
    assert _order([50, 50], [4, 4], seed=1).epoch(2)[0].tolist() == epochs[1, 2]


def test_batches_of_all_buckets_are_mixed():
    """Runs of one bucket are as short as chance makes them: about 100 changes in 200 batches of two buckets."""
    buckets = [ref.indices[0] // 200 for ref in _batches(_order([200, 200], [2, 2]))]
    assert 70 < sum(a != b for a, b in pairwise(buckets)) < 130


def test_within_a_bucket_images_are_mixed_anew():
    first, second = (_order([100], [1]).epoch(epoch)[0] for epoch in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3
    assert abs(np.corrcoef(first, np.arange(100))[0, 1]) < 0.3


def test_a_process_without_a_batch_in_the_last_round_gets_an_empty_one():
    shares = [_batches(_order([5], [2]), process_index=i, num_processes=2) for i in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    assert (shares[1][-1].indices, shares[1][-1].weight) == ((), 0.0)
    assert shares[0][-1].weight == 2.0  # alone in its step: the average over two processes halves it


def test_steps_go_on_from_those_done():
    sampler = BatchSampler(_order([10], [2]), accumulation=2)
    sampler.set_epoch(3, 7)
    assert [ref.step for ref in sampler] == [7, 7, 8, 8, 9]
    assert {ref.epoch for ref in sampler} == {3}


def test_an_interrupted_epoch_goes_on_where_it_stopped():
    whole = _batches(_order([10], [2]), accumulation=2)
    sampler = BatchSampler(_order([10], [2]), accumulation=2)
    sampler.set_epoch(1, 0, skip=2)
    assert list(sampler) == whole[2:]


def test_without_shuffling_the_order_is_the_tables():
    sampler = BatchSampler(_order([3, 2], [2, 2]), shuffle=False)
    assert [ref.indices for ref in sampler] == [(0, 1), (2,), (3, 4)]
