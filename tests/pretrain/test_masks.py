"""Masks as a config names them: counts, where they are drawn, what is refused."""

import pytest
import torch

from halfseen import recipes
from halfseen.config import ConfigError
from halfseen.pretrain import masks
from halfseen.pretrain.config import Pretrain

KINDS = ("random", "block", "block_v1", "coarse", "grid", "none")


def config_of(*overrides):
    return recipes.load(Pretrain, None, ["model.patch=16", "data.image_size=224", "run.seed=3", *overrides])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_as_many_patches_as_the_student_is_told(kind):
    config = config_of(f"mask.kind={kind}", "mask.ratio=0.4")
    positions = torch.arange(5, 9)
    mask = masks.create(config)(3, positions)
    assert mask.dtype == torch.bool
    assert mask.shape == (4, 196)
    counts, hidden = mask.sum(1), masks.hidden(config)
    assert (counts <= hidden).all()
    assert kind == "block_v1" or (counts == hidden).all()
    assert hidden == {"random": 79, "block": 79, "block_v1": 79, "coarse": 80, "grid": 147, "none": 0}[kind]


def test_what_the_loader_draws_is_what_the_device_would():
    for kind in KINDS:
        config = config_of(f"mask.kind={kind}", "mask.ratio=0.4")
        draw = masks.host(config)
        assert (draw is None) == (kind not in masks.BLOCK)
        if draw is not None:
            assert torch.equal(draw([7, 8]), masks.create(config)(3, torch.tensor([7, 8])))


def test_simmims_cells():
    config = config_of("mask.kind=coarse", "mask.ratio=0.6")
    assert masks.hidden_cells(config) == 30  # of 49, as published
    assert masks.hidden(config) == 120


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["mask.kind=coarse", "mask.cell=40"], "mask.cell"),
        (["mask.kind=grid", "mask.cell=48"], "mask.cell"),
        (["mask.kind=grid", "mask.cell=16"], "mask.cell"),
        (["mask.kind=coarse", "mask.ratio=0.99"], "mask.ratio"),
        (["mask.kind=coarse", "mask.count=3"], "mask.count"),
        (["mask.kind=block", "mask.count=196"], "mask.count"),
        (["mask.ratio=1.0"], "mask.ratio"),
        (["mask.min_aspect=0"], "mask.min_aspect"),
        (["mask.min_block=0"], "mask.min_block"),
        (["mask.max_block=8"], "mask.max_block"),
    ],
)
def test_impossible_masks_are_refused(overrides, key):
    with pytest.raises(ConfigError) as refused:
        masks.create(config_of(*overrides))
    assert refused.value.key == key
