"""Signs of collapse: what they say of features that are, and are not, all the same."""

import pytest
import torch

from halfseen.pretrain.collapse import feature_rank, spread
from halfseen.pretrain.targets import HOG, Pixels


def test_rank_counts_directions():
    torch.manual_seed(0)
    for directions in (1, 3, 10):
        basis = torch.linalg.qr(torch.randn(64, directions))[0]
        features = torch.randn(4000, directions) @ basis.T + 5
        assert feature_rank(features).item() == pytest.approx(directions, rel=0.05)


def test_rank_is_bounded_by_images_and_defined_for_equal_ones():
    assert feature_rank(torch.randn(4, 256)).item() <= 3.001
    assert feature_rank(torch.ones(4, 256)).item() == 0
    assert feature_rank(torch.randn(1, 256)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rank_survives_half_precision(dtype):
    torch.manual_seed(0)
    features = 30 * torch.randn(32, 256)  # products beyond float16's largest number
    with torch.autocast("cpu", dtype):
        found = feature_rank(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, feature_rank(features), rtol=1e-3, atol=0)  # products keep 8 or 11 bits


def test_neither_has_a_gradient():
    features = torch.randn(4, 8, requires_grad=True)
    assert not feature_rank(features).requires_grad
    assert not spread(features).requires_grad


def test_spread_is_the_variance_over_patches():
    values = torch.randn(5, 7, 3)
    torch.testing.assert_close(spread(values), values.flatten(0, 1).var(0, unbiased=False).mean())
    assert spread(torch.ones(5, 7, 3)) == 0


@pytest.mark.parametrize("target", [Pixels(8, True), Pixels(8, False, "absolute"), HOG(8)])
def test_the_same_answer_for_every_patch_shows(target):
    torch.manual_seed(0)
    wanted = target({"image": torch.randn(2, 3, 32, 32)})
    told = target.loss(wanted.mean((0, 1), keepdim=True).expand_as(wanted), wanted)
    assert told["prediction_variance"] < 1e-8
    assert told["target_variance"] > 1e-4
