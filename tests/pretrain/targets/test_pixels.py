"""Pixel targets: MAE's order of values, its normalisation, and the way back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfseen.pretrain.patches import EPS, patchify, standardise, unpatchify
from halfseen.pretrain.pictures import GAP, triplets
from halfseen.pretrain.targets import Pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_is_the_inverse(batch, patch, height, width):
    image = torch.randn(batch, 3, height * patch, width * patch)
    patches = patchify(image, patch)
    assert patches.shape == (batch, height * width, patch * patch * 3)
    assert torch.equal(unpatchify(patches, patch, (height, width)), image)


def test_values_are_ordered_row_column_channel():
    patch, image = 2, torch.arange(3 * 4 * 6.0).view(1, 3, 4, 6)
    patches = patchify(image, patch)
    for token, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        expected = [
            image[0, channel, 2 * y + row, 2 * x + column].item()
            for row in range(2)
            for column in range(2)
            for channel in range(3)
        ]
        assert patches[0, token].tolist() == expected


def test_plain_pixels_are_the_patches():
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(Pixels(4, normalise=False)({"image": image}), patchify(image, 4))


def test_normalised_pixels_have_the_unbiased_variance_and_epsilon_inside_the_root():
    image = torch.randn(2, 3, 8, 8) * 0.01 + 5
    patches = patchify(image.double(), 4)
    expected = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    target = Pixels(4, normalise=True)({"image": image})
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)
    # A flat patch is all epsilon: no division by zero.
    assert (Pixels(4, normalise=True)({"image": torch.full((1, 3, 4, 4), 0.5)}) == 0).all()
    assert EPS == 1e-6


def test_targets_leave_the_image_alone_and_carry_no_gradient():
    for side, patch in ((8, 4), (4, 4), (2, 1)):
        image = torch.randn(1, 3, side, side, requires_grad=True)
        before = image.detach().clone()
        assert not Pixels(patch, normalise=True)({"image": image}).requires_grad
        assert torch.equal(image.detach(), before)


def draw(norm_pix, prediction, image, mask):
    return triplets(image, mask, prediction, 4, norm_pix, MEAN, STD)


def columns_of(sheet, row, side):
    """The three pictures of a row."""
    top = GAP + row * (side + GAP)
    return [sheet[:, top : top + side, (left := GAP + n * (side + GAP)) : left + side] for n in range(3)]


def normalised(picture):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (picture.float() / 255 - mean) / std


def test_a_perfect_prediction_draws_the_original():
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    image = torch.stack([normalised(picture) for picture in pictures])
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for norm_pix in (False, True):
        target = standardise(patchify(image, 4))[0] if norm_pix else patchify(image, 4)
        sheet = draw(norm_pix, target, image, mask)
        assert sheet.dtype == torch.uint8
        assert sheet.shape == (3, 2 * (8 + GAP) + GAP, 3 * (8 + GAP) + GAP)
        for row in range(2):
            masked, restored, original = columns_of(sheet, row, 8)
            assert torch.equal(original, pictures[row])
            assert torch.equal(restored, pictures[row])
            cover = mask[row].view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
            assert (masked[:, cover] == 128).all()
            assert torch.equal(masked[:, ~cover], pictures[row][:, ~cover])


def test_visible_patches_are_pasted_over_any_prediction():
    picture = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    image = normalised(picture)[None]
    mask = torch.tensor([[True, False, False, False]])
    _, restored, _ = columns_of(draw(True, torch.full((1, 4, 48), 1e4), image, mask), 0, 8)
    assert (restored[:, :4, :4] == 255).all()
    assert torch.equal(restored[:, 4:], picture[:, 4:])
    assert torch.equal(restored[:, :, 4:], picture[:, :, 4:])
