"""Masks: exact counts, a function of (seed, position) alone, MAE's rule for given noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfseen.data.masks import mask_from_noise, random_mask, split

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
