"""Nearest neighbours are exact whatever the blocks, votes are weighted, and ranks together see every image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from halfseen.classification import knn
from halfseen.distributed import World


def unit(count, seed):
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


@settings(max_examples=40, deadline=None)
@given(queries=st.integers(1, 9), rows=st.integers(1, 40), k=st.integers(1, 50), block=st.integers(1, 45))
def test_blocks_find_what_one_product_finds(queries, rows, k, block):
    query, bank = unit(queries, 1), unit(rows, 2)
    similarity, row = knn.nearest(query, bank, k, block)
    whole = (query @ bank.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, whole.values[:, :k])
    torch.testing.assert_close((query @ bank.T).gather(1, row), similarity)
    assert all(len(set(found)) == len(found) == min(k, rows) for found in row.tolist())


def test_a_near_neighbour_outvotes_two_far_ones():
    similarity = torch.tensor([[0.9, 0.5, 0.5]])
    label = torch.tensor([[0, 1, 1]])
    assert knn.vote(similarity, label, 3, 0.07).argmax(1).tolist() == [0]
    assert knn.vote(similarity, label, 3, 100.0).argmax(1).tolist() == [1], "at a high temperature all count alike"
    expected = torch.tensor([[0.9 / 0.07, 0.5 / 0.07]]).exp()
    torch.testing.assert_close(knn.vote(similarity, label, 3, 0.07)[:, :2], expected * torch.tensor([1, 2]))


def test_several_k_in_one_pass_are_each_its_own():
    bank = unit(60, 3), torch.arange(60) % 4
    test = unit(30, 4), torch.arange(30) % 4
    together = knn.top1(bank, test, 4, [1, 5, 60], 0.07)
    assert list(together) == [1, 5, 60]
    for k, share in together.items():
        assert knn.top1(bank, test, 4, [k], 0.07) == {k: share}
    assert knn.top1(bank, bank, 4, [1], 0.07) == {1: 1.0}, "everything is its own nearest neighbour"


def test_features_are_unit_vectors_in_the_order_of_the_batches():
    image = torch.randn(7, 8)
    batches = [{"image": part, "label": torch.full((len(part),), 2), "position": part} for part in image.split(3)]
    value, label = knn.features(lambda batch: batch["image"] * 5, batches, lambda batch: batch, World())
    torch.testing.assert_close(value, F.normalize(image, dim=1))
    assert label.tolist() == [2] * 7
    assert value.norm(dim=1).tolist() == pytest.approx([1.0] * 7)
