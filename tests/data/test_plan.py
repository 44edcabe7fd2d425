"""Contract 1 and 2 in arithmetic: order depends on (seed, position) alone; each sample once per epoch."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfseen.data.loader import Share
from halfseen.data.plan import BLOCK, Plan, shares
from halfseen.derived import Batches

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def numbers(plan: Plan, positions: np.ndarray, counts: list[int]) -> np.ndarray:
    """Sample numbers in shard order, for a plan of one source."""
    source, shard, sample = plan.locate(positions)
    assert (source == 0).all()
    assert (sample >= 0).all()
    assert (sample < np.array(counts)[shard]).all()
    return (np.cumsum(counts) - counts)[shard] + sample


@given(
    counts=SHARDS,
    chunk=st.integers(1, 50),
    window=st.integers(1, 60),
    lanes=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation_of_all_samples(counts, chunk, window, lanes, seed):
    plan = Plan([np.array(counts)], seed=seed, chunk=chunk, window=window, lanes=lanes)
    total = sum(counts)
    for epoch in (0, 1, 7):
        seen = numbers(plan, np.arange(epoch * total, (epoch + 1) * total), counts)
        assert sorted(seen) == list(range(total))


@given(counts=SHARDS, start=st.integers(0, 500), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_position_gives_the_same_sample_however_it_is_asked_for(counts, start, data):
    ask = dict(seed=3, chunk=7, window=5, lanes=4)
    positions = np.arange(start, start + 60)
    reference = numbers(Plan([np.array(counts)], **ask), positions, counts)
    order = np.array(data.draw(st.permutations(range(60))))
    fresh = Plan([np.array(counts)], **ask)
    one_by_one = np.concatenate([numbers(fresh, positions[i : i + 1], counts) for i in order])
    assert (one_by_one == reference[order]).all()


@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    micro=st.integers(1, 4),
    start=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_ranks_and_micro_batches_cover_the_global_batches_in_order(world, accumulation, micro, start):
    batches = Batches(world * accumulation * micro, world, micro, accumulation)
    for step in range(3):
        parts = [
            Share(start, batches, rank).positions(step * accumulation + part)
            for rank in range(world)
            for part in range(accumulation)
        ]
        first = start + step * batches.total
        assert sorted(np.concatenate(parts)) == list(range(first, first + batches.total))
    for rank in range(world):
        assert (Share(start, batches, rank).positions(0) % world == rank).all()


def test_the_order_never_changes_between_versions():
    # A run that is resumed after an upgrade relies on it. If this fails, the plan has changed: say so in
    # CHANGELOG and refuse to resume older runs.
    plan = Plan([np.array([700, 1, 0, 299]), np.array([50])], [3.0, 1.0], seed=5, chunk=64, window=100, lanes=8)
    places = np.stack(plan.locate(np.arange(3000))).astype(np.int64)
    assert hashlib.sha256(places.tobytes()).hexdigest()[:16] == "6b1e51114189ba9e"


@pytest.mark.parametrize("total", [1500, 60_000])
def test_the_order_is_well_mixed(total):
    plan = Plan([np.full(total // 500, 500)], seed=0)
    order = numbers(plan, np.arange(total), [500] * (total // 500))
    displacement = np.abs(order - np.arange(total)).mean() / total
    assert displacement == pytest.approx(1 / 3, abs=0.03)
    # Neighbours in a shard are not neighbours in the order.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.15
    following = numbers(plan, np.arange(total, 2 * total), [500] * (total // 500))
    assert (following != order).mean() > 0.99


def test_a_chunk_is_read_by_one_rank_when_the_world_divides_the_lanes():
    plan = Plan([np.full(40, 1024 * 26)], seed=1, chunk=256, lanes=64)
    positions = np.arange(plan.orders[0].total)[: 1 << 18]
    _, shard, sample = plan.locate(positions)
    chunk = shard * 1000 + sample // 256
    ranks_per_chunk = [len(np.unique(positions[chunk == c] % 4)) for c in np.unique(chunk)[:200]]
    # Only chunks cut by the end of a lane are shared.
    assert np.mean(np.array(ranks_per_chunk) == 1) > 0.9


def test_a_mixture_has_exact_counts_in_every_block_and_no_gaps_in_any_source():
    sizes = [90, 40, 1000]
    plan = Plan([np.array([size]) for size in sizes], [1.0, 2.0, 5.0], seed=2)
    source, _, sample = plan.locate(np.arange(3 * BLOCK))
    for number, share in enumerate(plan.shares):
        per_block = (source == number).reshape(3, BLOCK).sum(1)
        assert (per_block == share).all()
        own = sample[source == number]
        for epoch in range(len(own) // sizes[number]):
            part = own[epoch * sizes[number] : (epoch + 1) * sizes[number]]
            assert len(np.unique(part)) == sizes[number]
    assert plan.shares == [512, 1024, 2560]
    # Not in a fixed pattern: two blocks differ.
    assert (source[:BLOCK] != source[BLOCK : 2 * BLOCK]).any()


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_shares_fill_a_block_and_starve_no_source(weights):
    counts = shares(weights)
    assert sum(counts) == BLOCK
    assert min(counts) >= 1


def test_repeats_give_an_image_to_consecutive_positions():
    once, thrice = (Plan([np.array([30])], seed=4, repeats=repeats) for repeats in (1, 3))
    positions = np.arange(90)
    assert (thrice.locate(positions)[2] == np.repeat(once.locate(np.arange(30))[2], 3)).all()


def test_replacements_are_of_the_same_source_and_spread_over_it():
    plan = Plan([np.array([5, 0, 7]), np.array([3])], seed=0)
    found = {plan.replacement(0, position, 0) for position in range(300)}
    assert found == {(0, sample) for sample in range(5)} | {(2, sample) for sample in range(7)}
    assert {plan.replacement(1, position, 1)[0] for position in range(30)} == {0}


def test_far_positions_are_found_without_walking_there():
    plan = Plan([np.full(1000, 1000)], seed=0)
    source, shard, sample = plan.locate(np.array([10**15, 10**15 + 1]))
    assert shard.shape == (2,)
    assert (sample < 1000).all()
