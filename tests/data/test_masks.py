"""Masks: exact counts, a function of (seed, position) alone, MAE's rule for given noise."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfseen.data.masks import (
    block_mask,
    block_masks,
    coarse_mask,
    grid_mask,
    mask_from_noise,
    random_mask,
    rectangle,
    split,
    unpack,
)

counts = st.integers(1, 60).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(0, tokens)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 2**50), sizes=counts)
def test_every_sample_hides_exactly_as_many(seed, start, sizes):
    tokens, hidden = sizes
    mask = random_mask(seed, torch.arange(start, start + 5), tokens, hidden)
    assert mask.dtype == torch.bool
    assert mask.shape == (5, tokens)
    assert (mask.sum(1) == hidden).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=8))
def test_a_mask_belongs_to_its_position_not_to_its_batch(seed, positions):
    together = random_mask(seed, torch.tensor(positions), 30, 20)
    for row, position in enumerate(positions):
        assert torch.equal(together[row], random_mask(seed, torch.tensor([position]), 30, 20)[0])


def test_seeds_and_positions_give_different_masks():
    positions = torch.arange(40)
    first, second = (random_mask(seed, positions, 64, 48) for seed in (0, 1))
    assert len({tuple(row.tolist()) for row in torch.cat([first, second])}) == 80


def test_every_token_is_hidden_equally_often_and_independently():
    mask = random_mask(3, torch.arange(4000), 16, 12).double()
    assert (mask.mean(0) - 0.75).abs().max() < 0.03
    # Drawing without replacement: the correlation of any two tokens is -1/(N-1).
    correlation = torch.corrcoef(mask.T)
    off_diagonal = correlation[~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal + 1 / 15).abs().max() < 0.08


def test_the_smallest_noise_stays_visible():
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.5], [0.8, 0.7, 0.2, 0.4]])
    expected = [[False, False, True, True], [True, True, False, False]]
    assert mask_from_noise(noise, 2).tolist() == expected


def test_ties_are_broken_in_token_order():
    assert mask_from_noise(torch.zeros(1, 5), 3).tolist() == [[False, False, True, True, True]]


@pytest.mark.parametrize("hidden", [-1, 5])
def test_impossible_counts_are_refused(hidden):
    with pytest.raises(ValueError, match="cannot hide"):
        mask_from_noise(torch.zeros(1, 4), hidden)


@settings(max_examples=50, deadline=None)
@given(sizes=counts, seed=st.integers(0, 1000))
def test_split_lists_both_sides_in_order(sizes, seed):
    tokens, hidden = sizes
    mask = random_mask(seed, torch.arange(3), tokens, hidden)
    visible_tokens, hidden_tokens = split(mask, tokens - hidden)
    for row in range(3):
        assert visible_tokens[row].tolist() == (~mask[row]).nonzero().flatten().tolist()
        assert hidden_tokens[row].tolist() == mask[row].nonzero().flatten().tolist()


# ------------------------------------------------------------------------------------------------- cells

tilings = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # cells down and across, patches on a side


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 2**50), tiling=tilings, data=st.data())
def test_a_coarse_mask_hides_whole_cells(seed, start, tiling, data):
    down, across, side = tiling
    hidden = data.draw(st.integers(0, down * across))
    mask = coarse_mask(seed, torch.arange(start, start + 4), (down * side, across * side), side, hidden)
    cells = mask.view(4, down, side, across, side)
    whole = cells[:, :, :1, :, :1]
    assert torch.equal(cells, whole.expand_as(cells))
    assert (whole.sum((1, 2, 3, 4)) == hidden).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 2**50), tiling=tilings)
def test_a_grid_mask_shows_the_same_patch_of_every_cell(seed, start, tiling):
    down, across, side = tiling
    mask = grid_mask(seed, torch.arange(start, start + 4), (down * side, across * side), side)
    cells = mask.view(4, down, side, across, side).transpose(2, 3).flatten(3)
    assert (cells.logical_not().sum(-1) == 1).all()
    assert torch.equal(cells, cells[:, :1, :1].expand_as(cells))


def test_every_place_of_a_cell_is_shown_and_every_cell_hidden_equally_often():
    positions = torch.arange(4000)
    shown = ~grid_mask(1, positions, (4, 4), 2)
    assert (shown.double().mean(0) - 0.25).abs().max() < 0.03
    assert (coarse_mask(1, positions, (4, 6), 2, 2).double().mean(0) - 2 / 6).abs().max() < 0.03


def test_cells_that_do_not_tile_the_grid_are_refused():
    with pytest.raises(ValueError, match="do not tile"):
        coarse_mask(0, torch.arange(1), (5, 4), 2, 1)
    with pytest.raises(ValueError, match="do not tile"):
        grid_mask(0, torch.arange(1), (5, 4), 2)


# ------------------------------------------------------------------------------------------------- blocks

grids = st.tuples(st.integers(2, 16), st.integers(2, 16))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**40), start=st.integers(0, 2**50), grid=grids, data=st.data())
def test_block_masks_hide_exactly_or_at_most_as_many(seed, start, grid, data):
    hidden = data.draw(st.integers(1, grid[0] * grid[1]))
    options = {"smallest": data.draw(st.integers(1, 20)), "largest": data.draw(st.none() | st.integers(1, 40))}
    positions = range(start, start + 3)
    exactly = block_masks(seed, positions, grid, hidden, **options)
    at_most = block_masks(seed, positions, grid, hidden, exact=False, **options)
    assert exactly.dtype == torch.bool
    assert exactly.shape == (3, grid[0] * grid[1])
    assert (exactly.sum(1) == hidden).all()
    assert (at_most.sum(1) <= hidden).all()
    assert (exactly | ~at_most).all()  # topping up only adds


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=5))
def test_a_block_mask_belongs_to_its_position_not_to_its_batch(seed, positions):
    together = block_masks(seed, positions, (14, 14), 75)
    for row, position in enumerate(positions):
        assert torch.equal(together[row], block_masks(seed, [position], (14, 14), 75)[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 6), st.integers(0, 6), st.integers(11, 14))
def test_rectangle_has_the_bits_of_its_patches(top, left, down, across, width):
    plane = torch.zeros(12, width, dtype=torch.bool)
    plane[top : top + down, left : left + across] = True
    assert unpack(rectangle(top, left, down, across, width), 12 * width).tolist() == plane.flatten().tolist()


def test_the_first_rectangle_keeps_area_and_aspect():
    for seed in range(300):
        # A single rectangle: whatever comes first is larger than what is then left to hide.
        mask = unpack(block_mask(random.Random(seed), (14, 14), 30, smallest=16), 196).reshape(14, 14)
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        down, across = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if mask.sum() == down * across:  # it stayed alone
            assert down * across <= 30
            assert (down - 0.5) / (across + 0.5) <= 1 / 0.3
            assert (across - 0.5) / (down + 0.5) <= 1 / 0.3


def test_neighbours_go_together_and_the_middle_is_hidden_most():
    masks = block_masks(5, range(2000), (14, 14), 75).view(-1, 14, 14)
    same = (masks[:, :, 1:] == masks[:, :, :-1]).double().mean()
    assert 0.875 < same < 0.895  # 0.885 in the official generator, 0.53 if patches were independent
    frequency = masks.double().mean(0)
    assert frequency[5:9, 5:9].mean() > 0.5 > 0.2 > frequency[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert (frequency - frequency.T).abs().max() < 0.06
    assert (frequency - frequency.flip(0, 1)).abs().max() < 0.06
