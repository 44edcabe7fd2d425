"""Pictures and masks stay together: every pixel keeps its class through scaling, cropping and flipping."""

import random

import pytest
import torch
from torchvision.io import encode_png

from halfseen.config import Data, Source
from halfseen.data import evaluation_batches, open_set, train_batches
from halfseen.data.pairs import NOTHING, JointCrop, Pairs, ShortSide, decode_mask
from halfseen.data.reader import BadSample
from halfseen.data.writer import ShardWriter
from halfseen.derived import Batches


def pair(number, height=20, width=30):
    """A picture whose red tells the class of each pixel, and its mask: 40 grey levels per class."""
    mask = (torch.arange(height)[:, None] // 7 + torch.arange(width) // 11 + number) % 5
    image = torch.stack([mask * 40, mask * 0 + number, mask * 0]).to(torch.uint8)
    return image, mask[None].to(torch.uint8)


@pytest.fixture
def shard(tmp_path):
    with ShardWriter(tmp_path / "pairs.tar") as writer:
        for number in range(11):
            image, mask = (encode_png(part).numpy().tobytes() for part in pair(number))
            members = {"png": image, "seg.png": mask if number != 5 else b"no mask"}
            writer.write(f"k{number}", members)
    return tmp_path / "pairs.tar"


def settings(shard, **more):
    options = {"label": "seg.png", "classes": 5, "image_size": 16, "workers": 0, "chunk": 2, "window": 4}
    options["bad_limit"] = 0.5
    return Data(train=[Source(str(shard))], val=str(shard), **options, **more)


def agree(image, mask):
    """Whether red tells the class wherever there is one; at edges between classes scaling blends the colours."""
    known = mask[:, 0] != NOTHING
    right = (image[:, 0].float() / 40 - mask[:, 0].float()).abs() < 0.5
    return right[known].float().mean()


def test_training_pairs_are_cropped_alike_and_bad_ones_replaced(shard, tmp_path):
    data = settings(shard)
    crop = JointCrop(16, (0.6, 2.0), 0.5)
    ledger = tmp_path / "ledger.jsonl"
    plan = Batches(8, 1, 8, 1)
    options = {"seed": 3, "plan": plan, "rank": 0, "images": Pairs}
    stream = train_batches(open_set(data, "train"), data, crop, start=0, ledger=ledger, **options)
    batch = [next(stream) for _ in range(4)][-1]
    assert batch["image"].shape == (8, 3, 16, 16)
    assert batch["view"].shape == (8, 1, 16, 16)
    assert agree(batch["image"], batch["view"]) > 0.9
    assert "k5" in ledger.read_text()
    again = train_batches(open_set(data, "train"), data, crop, start=24, **options)
    assert torch.equal(next(again)["view"], batch["view"]), "a function of the position alone"


def test_evaluation_sees_every_good_pair_once_over_any_ranks(shard):
    data = settings(shard)
    keys = []
    for rank in range(3):
        val, whole = open_set(data, "val"), ShortSide(data.image_size)
        for batch in evaluation_batches(val, data, whole, rank=rank, world=3, batch=1, images=Pairs):
            keys += batch["key"]
            if batch["key"]:
                assert batch["image"].shape == (1, 3, 16, 24), "the shorter side has data.image_size"
                assert torch.equal(batch["view"][0], pair(int(batch["key"][0][1:]))[1]), "the mask is as it was"
    assert sorted(keys) == sorted(f"k{number}" for number in range(11) if number != 5)


def test_a_picture_smaller_than_the_square_is_surrounded_by_nothing():
    image, mask = JointCrop(64, (0.5, 0.5))(torch.cat(pair(0)), random.Random(0))
    assert image.shape == (3, 64, 64)
    assert (mask == NOTHING).float().mean() == pytest.approx(1 - 32 * 48 / 64**2)
    assert (image[:, mask[0] == NOTHING] == 0).all()


def test_a_flip_turns_both():
    image, mask = JointCrop(20, (1.0, 1.0001), 1.0)(torch.cat(pair(0, 20, 20)), random.Random(0))
    plain, kept = pair(0, 20, 20)
    assert torch.equal(image, plain.flip(2))
    assert torch.equal(mask, kept.flip(2))


def test_a_mask_in_colour_is_refused_and_a_palette_gives_its_indices():
    with pytest.raises(BadSample, match="mode RGB"):
        decode_mask(encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)).numpy().tobytes())
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_mask(b"x")
    assert torch.equal(decode_mask(encode_png(pair(1)[1]).numpy().tobytes()), pair(1)[1])
