"""One crop in two sizes, and masks drawn beside the images."""

import random
from pathlib import Path

import pytest
import torch

from halfseen import data
from halfseen.config import Augment, Data, Source
from halfseen.data.masks import block_masks
from halfseen.data.transforms import RandomCrop, TwoViews, pretrain_transform, resize
from halfseen.derived import Batches


def image_of(seed, height=90, width=120):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_view_is_the_one_without_a_second(seed, jitter):
    augment = Augment(jitter=jitter)
    alone = pretrain_transform(augment, 32)(image_of(seed), random.Random(seed))
    first, second = pretrain_transform(augment, 32, 16)(image_of(seed), random.Random(seed))
    assert torch.equal(first, alone)
    assert second.shape == (3, 16, 16)
    assert second.dtype == torch.uint8


def test_both_views_are_of_the_same_crop_flipped_alike():
    for seed in range(8):
        crop = RandomCrop(Augment(flip=0.5), (32, 32))
        first, second = TwoViews(crop, (32, 32))(image_of(seed), random.Random(seed))
        assert torch.equal(first, second)
    smooth = resize(image_of(1), (6, 8)).repeat_interleave(20, 1).repeat_interleave(20, 2)
    first, second = TwoViews(crop, (16, 16))(smooth, random.Random(3))
    assert (resize(first, (16, 16)).float() - second.float()).abs().mean() < 3


def test_batches_hold_both_views_and_the_mask_of_their_positions():
    shards = Path(data.__file__).parent / "embedded" / "emoji"
    settings = Data(train=[Source(f"{shards}/train-*.tar")], label="none", image_size=16, workers=1)

    def draw(positions):
        return block_masks(4, positions, (4, 4), 6, smallest=2)

    stream = data.train_batches(
        data.open_set(settings, "train"),
        settings,
        pretrain_transform(Augment(), 16, 8),
        seed=1,
        start=5,
        plan=Batches(3, 1, 3, 1),
        rank=0,
        mask=draw,
    )
    batch = next(stream)
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["view"].shape == (3, 3, 8, 8)
    assert torch.equal(batch["mask"], draw([5, 6, 7]))
