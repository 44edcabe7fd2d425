"""Position tables: MAE's layout, and resampling."""

import math

import pytest
import torch

from halfseen.models.positions import resize, sincos


def test_the_column_comes_before_the_row():
    table = sincos(16, (3, 4), 0)[0]
    one_right, one_down = table[1], table[4]
    sines_x, sines_y = slice(0, 4), slice(8, 12)
    assert (one_right[sines_x] != 0).all()
    assert (one_right[sines_y] == 0).all()
    assert (one_down[sines_x] == 0).all()
    assert (one_down[sines_y] != 0).all()


def test_a_row_is_sines_and_cosines_of_its_coordinates():
    y, x, width = 2, 3, 8
    row = sincos(width, (3, 5), 1)[0, 1 + y * 5 + x]
    frequency = [10000 ** -(k / (width / 4)) for k in range(width // 4)]
    expected = [f(t * w) for t in (x, y) for f in (math.sin, math.cos) for w in frequency]
    torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-7)


def test_prefix_rows_are_zero_and_first():
    table = sincos(8, (2, 2), 2)
    assert table.shape == (1, 6, 8)
    assert (table[:, :2] == 0).all()
    assert torch.equal(table[:, 2:], sincos(8, (2, 2), 0))


def test_a_width_not_divisible_by_four_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos(6, (2, 2), 0)


def test_resize_to_the_same_grid_is_the_identity():
    table = torch.randn(1, 13, 8)
    assert resize(table, (3, 4), (3, 4), 1) is table


def test_resize_keeps_prefix_rows_constants_and_orientation():
    grid, larger = (3, 5), (6, 10)
    rows = torch.arange(3.0).repeat_interleave(5)
    columns = torch.arange(5.0).repeat(3)
    table = torch.stack([torch.ones(15), rows, columns], dim=1)
    table = torch.cat([torch.full((2, 3), 7.0), table])[None]
    moved = resize(table, grid, larger, 2)
    assert moved.shape == (1, 2 + 60, 3)
    assert torch.equal(moved[:, :2], table[:, :2])
    plane = moved[0, 2:].view(6, 10, 3)
    torch.testing.assert_close(plane[..., 0], torch.ones(6, 10))
    torch.testing.assert_close(plane[..., 1], plane[:, :1, 1].expand(6, 10), rtol=0, atol=1e-5)
    torch.testing.assert_close(plane[..., 2], plane[:1, :, 2].expand(6, 10), rtol=0, atol=1e-5)
    # Twice as fine: the middle of the plane rises half as fast.
    torch.testing.assert_close(plane[2, 3:7, 2].diff(), torch.full((3,), 0.5), rtol=0, atol=0.1)


def test_resize_refuses_a_table_of_another_grid():
    with pytest.raises(ValueError, match="rows"):
        resize(torch.zeros(1, 10, 4), (3, 4), (6, 8), 1)
