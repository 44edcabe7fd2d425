"""MaskFeat's target: against the definition, pixel by pixel in double precision, and what it must not depend on."""

import math

import pytest
import torch

from halfseen.config import Augment, ConfigError
from halfseen.pretrain.targets.hog import BINS, CELL, HOG, by_cell, by_patch, histograms, strokes


def by_definition(image, patch):
    """One patch, cell, pixel after the other: [N, 27 * cells], in Python's doubles."""
    _, height, width = image.shape
    value = image.double()

    def at(channel, y, x):
        """A pixel; beyond the border the image is mirrored, the border pixel not repeated."""
        y = -y if y < 0 else 2 * height - 2 - y if y >= height else y
        x = -x if x < 0 else 2 * width - 2 - x if x >= width else x
        return value[channel, y, x].item()

    def cell(channel, top, left):
        votes = [0.0] * BINS
        for y in range(top, top + CELL):
            for x in range(left, left + CELL):
                across = sum(w * (at(channel, y + d, x - 1) - at(channel, y + d, x + 1)) for d, w in SMOOTH)
                down = sum(w * (at(channel, y - 1, x + d) - at(channel, y + 1, x + d)) for d, w in SMOOTH)
                angle = math.atan2(across, down) % math.pi
                votes[min(int(angle / (math.pi / BINS)), BINS - 1)] += math.sqrt(across**2 + down**2)
        length = math.sqrt(sum(vote**2 for vote in votes))
        return [vote / max(length, 1e-12) for vote in votes]

    side = patch // CELL
    rows = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            cells = [
                [[cell(c, top + CELL * i, left + CELL * j) for j in range(side)] for i in range(side)] for c in range(3)
            ]
            rows.append(
                [cells[c][i][j][b] for c in range(3) for b in range(BINS) for i in range(side) for j in range(side)]
            )
    return torch.tensor(rows, dtype=torch.float64)


SMOOTH = ((-1, 1.0), (0, 2.0), (1, 1.0))


@pytest.mark.parametrize(("patch", "size"), [(16, (32, 16)), (8, (16, 24))])
def test_values_and_their_order_are_those_of_the_definition(patch, size):
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    target = HOG(patch)({"image": image[None]})
    expected = by_definition(image, patch)
    assert target.dtype == torch.float32
    assert target.shape == (1, *expected.shape)
    assert expected.shape[1] == HOG(patch).width == 27 * (patch // 8) ** 2
    torch.testing.assert_close(target[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_of_16_has_the_published_108_values():
    assert HOG(16).width == 108


def test_brightness_and_contrast_of_a_channel_do_not_matter():
    image = torch.rand(1, 3, 16, 16)
    factor, shift = torch.tensor([2.0, 0.5, 4.0]).view(3, 1, 1), torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(histograms(image * factor + shift), histograms(image), rtol=1e-3, atol=1e-4)


def test_an_edge_and_its_negative_count_as_one():
    image = torch.rand(1, 3, 16, 16)
    # A gradient along the border of two bins may fall to either side of it.
    torch.testing.assert_close(histograms(-image), histograms(image), rtol=1e-4, atol=1e-4)


def test_a_flat_image_has_no_histogram_and_every_other_has_length_one():
    assert (histograms(torch.full((1, 3, 16, 16), 0.3)) == 0).all()
    lengths = histograms(torch.rand(2, 3, 16, 24)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones(2, 3, 2, 3))


def test_cells_and_patches_are_inverses():
    cells = torch.rand(2, 3, BINS, 4, 6)
    assert torch.equal(by_cell(by_patch(cells, 2), (2, 3), 2), cells)


def test_patches_that_cells_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="cells of 8 pixels do not divide a patch of 14"):
        HOG(14)


def test_the_picture_draws_strokes_along_the_edges():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1.0  # a vertical edge
    drawn = strokes(histograms(image))
    assert drawn.shape == image.shape
    assert drawn[0, :, :, 3:5].sum() > 1.5 * drawn[0, :, 3:5, :8].sum()  # upright strokes in the cells at the edge
    target = HOG(16)
    batch = {"image": image, "mask": torch.tensor([[True]])}
    batch["target"] = target(batch)
    picture = target.picture(batch, batch["target"], Augment())
    assert picture.dtype == torch.uint8
    left, middle, right = (picture[:, 4:20, 4 + 20 * n : 20 + 20 * n] for n in range(3))
    assert (left == 128).all()
    assert torch.equal(middle, right)
