"""Stems: the convolutions they stand for, one token per patch, costs, refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfseen.config import ConfigError
from halfseen.models.stem import HMLP_FACTORS, ConvStem, HMLPStem, PatchStem, stem_of

EPS = 1e-6


def as_convolutions(stem, image):
    """The stem's modules applied as the published convolutions on a channels-first map."""
    x = image
    for module in stem.proj:
        if isinstance(module, nn.BatchNorm1d):
            mean, variance = module.running_mean, module.running_var
            x = F.batch_norm(x, mean, variance, module.weight, module.bias, module.training, 0.0)
        elif isinstance(module, nn.LayerNorm):
            x = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = module(x)
    return x.flatten(2).transpose(1, 2)


def scrambled(stem):
    for parameter in stem.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stem


@pytest.mark.parametrize("patch", sorted(HMLP_FACTORS))
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_hmlp_equals_its_convolutions(patch, norm):
    stem = scrambled(HMLPStem(16, patch, norm, EPS))
    image = torch.randn(2, 3, 2 * patch, 3 * patch)
    for training in (False, True):
        stem.train(training)
        torch.testing.assert_close(stem(image), as_convolutions(stem, image), rtol=1e-4, atol=1e-5)


def test_the_patch_stem_equals_its_convolution():
    stem = PatchStem(24, 8)
    image = torch.randn(2, 3, 16, 24)
    expected = stem.proj(image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(image), expected, rtol=1e-4, atol=1e-5)


def test_the_conv_stem_has_one_token_per_patch():
    for norm in ("layer", "batch"):
        stem = scrambled(ConvStem(16, 8, norm, EPS))
        image = torch.randn(2, 3, 16, 24)
        assert stem(image).shape == (2, 6, 16)
        torch.testing.assert_close(stem(image), as_convolutions(stem, image), rtol=1e-4, atol=1e-5)


def touched(stem, training):
    """Tokens of a batch that change when one pixel block of the second image does."""
    stem.train(training)
    image = torch.randn(2, 3, 48, 64)
    other = image.clone()
    other[1, :, 16:32, 32:48] += torch.randn(3, 16, 16)
    with torch.no_grad():
        return (stem(image) != stem(other)).any(-1).nonzero().tolist()


@pytest.mark.parametrize(("kind", "norm"), [("patch", "layer"), ("hmlp", "layer"), ("hmlp", "batch")])
@pytest.mark.parametrize("training", [False, True])
def test_one_patch_touches_one_token(kind, norm, training):
    stem = scrambled(stem_of(kind, 16, 16, norm, EPS))
    places = touched(stem, training)
    if kind == "hmlp" and norm == "batch" and training:
        assert len(places) == 24  # batch statistics carry it to every token
    else:
        assert places == [[1, 6]]


def test_overlapping_convolutions_leak():
    assert len(touched(scrambled(ConvStem(16, 16, "layer", EPS)), training=False)) > 1


@pytest.mark.parametrize("kind", ["patch", "hmlp"])
def test_chosen_patches_are_rows_of_the_whole(kind):
    stem = scrambled(stem_of(kind, 16, 16, "layer", EPS))
    image = torch.randn(3, 3, 32, 48)
    index = torch.tensor([[0, 5], [2, 3], [4, 1]])
    whole = stem(image)
    expected = torch.stack([whole[b, index[b]] for b in range(3)])
    torch.testing.assert_close(stem(image, index), expected, rtol=0, atol=1e-5)


def test_the_conv_stem_refuses_chosen_patches():
    with pytest.raises(ValueError, match="overlap"):
        ConvStem(16, 8, "layer", EPS)(torch.randn(1, 3, 16, 16), torch.tensor([[0]]))


@pytest.mark.parametrize(
    ("width", "linear", "hmlp", "linear_gmac", "hmlp_gmac"),
    [
        (192, 147_648, 49_248, 0.0289, 0.0217),
        (384, 295_296, 190_656, 0.0578, 0.0723),
        (768, 590_592, 749_952, 0.1156, 0.2601),
        (1024, 787_456, 1_327_616, 0.1541, 0.4496),
    ],
)
def test_parameters_and_cost_are_the_published_ones(width, linear, hmlp, linear_gmac, hmlp_gmac):
    with torch.device("meta"):
        stems = {"patch": (linear, linear_gmac), "hmlp": (hmlp, hmlp_gmac)}
        for kind, (parameters, gmac) in stems.items():
            stem = stem_of(kind, width, 16, "batch", EPS)
            assert sum(p.numel() for p in stem.parameters()) == parameters
            assert stem.flops() * 196 / 2e9 == pytest.approx(gmac, abs=6e-5)
        # Graham's stem costs 1.48 GMAC more than the linear one at width 768.
        if width == 768:
            extra = (ConvStem(768, 16, "batch", EPS).flops() * 196 / 2e9) - linear_gmac
            assert extra == pytest.approx(1.48, abs=0.02)


def test_the_hmlp_stem_has_the_published_names():
    names = set(HMLPStem(16, 16, "batch", EPS).state_dict())
    expected = {f"proj.{i}.{part}" for i in (0, 1, 3, 4, 6, 7) for part in ("weight", "bias")}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert names == expected | {f"proj.{i}.{part}" for i in (1, 4, 7) for part in buffers}


@pytest.mark.parametrize(
    ("kind", "width", "patch", "key"),
    [
        ("hmlp", 16, 15, "model.patch"),
        ("hmlp", 18, 16, "model.width"),
        ("conv", 16, 14, "model.patch"),
        ("conv", 12, 16, "model.width"),
    ],
)
def test_stems_that_do_not_exist_are_refused(kind, width, patch, key):
    with pytest.raises(ConfigError) as refused:
        stem_of(kind, width, patch, "layer", EPS)
    assert refused.value.key == key


def test_the_refusal_lists_the_patches_that_exist():
    with pytest.raises(ConfigError, match=r"8, 14, 16, 28, 32"):
        HMLPStem(16, 10, "layer", EPS)
