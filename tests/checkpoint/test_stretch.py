"""A stretch of a flattened tensor is written and read as the rectangles that it is."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from halfseen.checkpoint import stream
from halfseen.checkpoint.checkpoints import hush
from halfseen.checkpoint.stretch import Stretch, rectangles

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def stretches(draw):
    """A shape, and where in its numbers a stretch begins and ends."""
    shape = draw(SHAPES)
    count = math.prod(shape)
    start = draw(st.integers(0, count))
    return shape, start, draw(st.integers(start, count))


@given(stretches())
def test_the_rectangles_hold_the_stretch_once_in_order(case):
    shape, start, end = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = [
        numbers[tuple(slice(first, first + size) for first, size in zip(offsets, sizes))].flatten()
        for offsets, sizes in rectangles(shape, start, end - start)
    ]
    assert torch.cat([*found, torch.empty(0)]).tolist() == list(range(start, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def divided(numbers, cuts):
    """Stretches between the cuts, each with memory of its own."""
    places = sorted({0, *(min(cut, numbers.numel()) for cut in cuts), numbers.numel()})
    flat = numbers.flatten()
    return [Stretch(flat[a:b].clone(), numbers.shape, a) for a, b in zip(places, [*places[1:], places[-1]])]


class Several(Stretch):
    """What all ranks write, in one process."""

    @staticmethod
    def __new__(cls, parts):
        made = Stretch.__new__(cls, parts[0].numbers, parts[0].shape, 0)
        made.parts = parts
        return made

    def __create_write_items__(self, key, value):
        return [item for part in self.parts for item in part.__create_write_items__(key, part)]

    def __get_tensor_shard__(self, index):
        owner = next(p for p in self.parts if index.offset in [c.offsets for c in p.__create_chunk_list__()])
        return owner.__get_tensor_shard__(index)


@settings(deadline=None, max_examples=30)
@given(stretches(), st.lists(st.integers(0, 600), max_size=3))
def test_any_stretch_is_filled_from_any_division_and_so_is_the_whole(case, cuts):
    shape, start, end = case
    numbers = torch.arange(float(math.prod(shape))).view(shape) + 1
    if not numbers.numel():
        return
    with tempfile.TemporaryDirectory() as folder:
        hush()
        dcp.save({"a": Several(divided(numbers, cuts))}, checkpoint_id=folder, no_dist=True)
        part, whole = Stretch(torch.zeros(end - start), numbers.shape, start), torch.zeros(shape)
        for own in (part, whole):
            dcp.load({"a": own}, checkpoint_id=folder, no_dist=True)
        assert torch.equal(part.numbers, numbers.flatten()[start:end])
        assert torch.equal(whole, numbers)
        bands = list(stream.bands(Path(folder), stream.stored(Path(folder))["a"]))
        assert torch.equal(torch.cat([band.flatten() for band in bands]), numbers.flatten())
        assert len(bands) >= len(
            [part for part in divided(numbers, cuts) if part.numbers.numel()]
        )  # never put together


def test_equal_stretches_end_where_the_tensor_ends():
    numbers = torch.arange(10.0).view(2, 5)
    padded = [torch.cat([numbers.flatten(), torch.zeros(6)])[4 * rank : 4 * rank + 4] for rank in range(4)]
    found = [Stretch.nth(own, numbers.shape, rank) for rank, own in enumerate(padded)]
    assert [(own.start, own.numbers.numel()) for own in found] == [(0, 4), (4, 4), (8, 2), (10, 0)]
    assert torch.equal(torch.cat([own.numbers for own in found]), numbers.flatten())


def test_it_fills_from_whole_tensors_and_its_like_alone():
    own = Stretch(torch.zeros(3), torch.Size([2, 4]), 2)
    own.fill(torch.arange(8.0).view(2, 4))
    assert own.numbers.tolist() == [2, 3, 4]
    own.fill(Stretch(torch.ones(3), torch.Size([2, 4]), 2))
    assert own.numbers.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="another stretch"):
        own.fill(Stretch(torch.ones(3), torch.Size([2, 4]), 3))


def test_it_has_the_shape_of_the_whole_and_computes_nothing():
    own = Stretch(torch.zeros(3), torch.Size([2, 4]), 2)
    assert (own.shape, own.numel(), own.dtype) == (torch.Size([2, 4]), 8, torch.float32)
    assert repr(own) == "Stretch(2 to 5 of [2, 4])"
    with pytest.raises(TypeError, match="use its numbers"):
        own.sum()
