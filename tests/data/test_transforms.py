"""Transforms follow torchvision and timm in what they draw and compute, and depend on the generator alone."""

import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from PIL import Image, ImageOps
from torchvision import transforms as tv

from halfseen.config import Augment, ConfigError
from halfseen.data.hashing import generator
from halfseen.data.transforms import (
    colour_jitter,
    crop_box,
    evaluation_transform,
    finetune_transform,
    normalise,
    pretrain_transform,
    randaugment,
    resize,
    simple_crop,
    three_augment,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-mstd0.5-inc1"


def image(height: int = 60, width: int = 90, seed: int = 0) -> torch.Tensor:
    small = np.random.default_rng(seed).integers(0, 255, (height // 6 + 1, width // 6 + 1, 3), np.uint8)
    smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(smooth)).permute(2, 0, 1)


def pillow(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def as_int(picture) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).int()


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (200, 130)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_resize_is_pillows_bicubic(size, contiguous):
    source = image().contiguous() if contiguous else image()
    expected = as_int(pillow(source).resize(size[::-1], Image.Resampling.BICUBIC))
    difference = (resize(source, size).int() - expected).abs().float()
    assert difference.mean() <= 0.1
    assert difference.max() <= 4


def test_crop_boxes_have_torchvisions_distribution():
    scale, ratio, count = (0.2, 1.0), (0.75, 4 / 3), 4000
    rng = random.Random(0)
    torch.manual_seed(0)
    blank = torch.empty(3, 100, 150)
    ours = np.array([crop_box(100, 150, scale, ratio, rng) for _ in range(count)], float)
    theirs = np.array([tv.RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)], float)
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        assert np.abs(a - b).mean() < 1.5, ("top", "left", "height", "width")[column]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 2), (16, 16), (97, 31)])
def test_crop_boxes_lie_inside_any_picture(height, width):
    rng = random.Random(1)
    for _ in range(50):
        top, left, h, w = crop_box(height, width, (0.08, 1.0), (0.75, 4 / 3), rng)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0
        assert w > 0


def test_the_centre_fallback_is_torchvisions():
    # No crop of 99-100 % of the area and ratio ~1 exists in a long strip.
    assert crop_box(10, 1000, (0.99, 1.0), (1.0, 1.01), random.Random(0)) == (0, 495, 10, 10)
    assert crop_box(1000, 10, (0.99, 1.0), (1.0, 1.01), random.Random(0)) == (495, 0, 10, 10)


TRANSFORMS = {
    "pretrain": pretrain_transform(Augment(), 16),
    "pretrain with jitter": pretrain_transform(Augment(jitter=0.4), 32),
    "not square": pretrain_transform(Augment(), (16, 48)),
    "finetune": finetune_transform(Augment(randaugment=POLICY), 16),
    "evaluation": evaluation_transform(16),
    "evaluation, not square": evaluation_transform((16, 48)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("height", "width"), [(60, 90), (5, 7), (1, 1), (16, 16), (200, 20)])
def test_a_transform_depends_on_the_generator_alone(name, height, width):
    transform, source = TRANSFORMS[name], image(height, width)
    kept = source.clone()
    results = []
    for noise in (0, 1):
        random.seed(noise), np.random.seed(noise), torch.manual_seed(noise)
        python_state, numpy_state, torch_state = (
            random.getstate(),
            np.random.get_state()[1],
            torch.get_rng_state(),
        )
        results.append([transform(source, generator(3, position, "augment")) for position in range(8)])
        assert random.getstate() == python_state
        assert (np.random.get_state()[1] == numpy_state).all()
        assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(source, kept)
    expected = (16, 48) if "not square" in name else (32, 32) if "jitter" in name else (16, 16)
    assert {tuple(result.shape) for result in results[0]} == {(3, *expected)}
    assert all(result.dtype == torch.uint8 for result in results[0])
    if "evaluation" not in name and height * width > 1000:
        assert len({result.contiguous().numpy().tobytes() for result in results[0]}) > 1


def test_flip_and_full_crop_do_what_they_say():
    source = image(16, 16)
    whole = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert torch.equal(pretrain_transform(Augment(flip=0.0, **whole), 16)(source, random.Random(0)), source)
    assert torch.equal(pretrain_transform(Augment(flip=1.0, **whole), 16)(source, random.Random(0)), source.flip(2))
    flips = sum(
        not torch.equal(pretrain_transform(Augment(flip=0.25, **whole), 16)(source, generator(0, p, "a")), source)
        for p in range(2000)
    )
    assert flips == pytest.approx(500, abs=80)


def test_jitter_is_torchvisions():
    source, strength = image(), 0.4
    for seed in range(20):
        rng = random.Random(seed)
        names = ["brightness", "contrast", "saturation"]
        rng.shuffle(names)
        expected = source
        for name in names:
            factor = rng.uniform(1 - strength, 1 + strength)
            expected = getattr(V, f"adjust_{name}")(expected, factor)
        ours = colour_jitter(source, strength, random.Random(seed))
        difference = (ours.int() - expected.int()).abs().float()
        assert difference.mean() < 0.1  # rounding, after each of three operations
        assert difference.max() <= 3


@pytest.mark.parametrize(("height", "width"), [(60, 90), (300, 225), (500, 375)])
@pytest.mark.parametrize("size", [16, 96, 256])
def test_evaluation_is_resize_and_centre_crop(height, width, size):
    shorter = int(size * 256 / 224) if size <= 224 else size
    bicubic = tv.InterpolationMode.BICUBIC
    expected = tv.Compose([tv.Resize(shorter, bicubic), tv.CenterCrop(size)])(pillow(image(height, width)))
    result = evaluation_transform(size)(image(height, width), random.Random(0))
    assert result.shape == (3, size, size)
    assert (result.int() - as_int(expected)).abs().float().mean() <= 0.1


@pytest.mark.parametrize(("share", "shorter"), [(1.0, 16), (0.875, 18), (0.5, 32)])
def test_the_share_that_evaluation_shows_can_be_chosen(share, shorter):
    bicubic = tv.InterpolationMode.BICUBIC
    expected = tv.Compose([tv.Resize(shorter, bicubic), tv.CenterCrop(16)])(pillow(image(48, 64)))
    result = evaluation_transform(16, share)(image(48, 64), random.Random(0))
    assert (result.int() - as_int(expected)).abs().float().mean() <= 0.1


# ------------------------------------------------------------------------------------------- RandAugment


def test_posterize_always_keeps_a_bit():
    # At magnitude 10, timm's increasing posterize asks for 0 bits, which Pillow 13 refuses.
    policy = randaugment(Augment(randaugment="rand-m10-p1-inc1"), 16)
    posterize = [operation for operation in policy.ops if operation.name.startswith("Posterize")]
    assert len(posterize) == 1
    source = pillow(image(16, 16))
    assert posterize[0].level_fn(10, {}) == (1,)
    assert posterize[0].level_fn(5, {}) == (2,)
    assert np.array_equal(np.array(posterize[0](source)), np.array(ImageOps.posterize(source, 1)))


@pytest.mark.parametrize(
    "policy", ["rand-m10-n6-p1-mstd5-inc1", "rand-m1-n6-p1-mstd5", "rand-m9-mstd101-inc1-tweights"]
)
def test_randaugment_survives_many_draws(policy):
    transform = finetune_transform(Augment(randaugment=policy), 8)
    source = image(12, 12)
    for position in range(1500):
        transform(source, generator(0, position, "augment"))


def test_randaugment_has_timms_settings():
    policy = randaugment(Augment(randaugment=POLICY, mean=MEAN), 224)
    operation = policy.ops[0]
    assert policy.num_layers == 2
    assert operation.magnitude == 9
    assert operation.magnitude_std == 0.5
    assert operation.hparams["translate_const"] == 100
    assert operation.kwargs["fillcolor"] == (124, 116, 104)
    assert operation.kwargs["resample"] == Image.Resampling.BICUBIC


def test_a_policy_timm_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"augment\.randaugment"):
        finetune_transform(Augment(randaugment="augmix-m9"), 16)
    with pytest.raises(ConfigError, match=r"augment\.randaugment"):
        finetune_transform(Augment(randaugment="rand-q9"), 16)


# ------------------------------------------------------------------------------------------- on the device


def test_normalise():
    batch = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    expected = (batch.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    result = normalise(batch, MEAN, STD)
    assert result.dtype == torch.float32
    assert result.shape == batch.shape
    assert (result - expected).abs().max() < 2e-6
    assert math.isclose(float(normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), [0.5] * 3, [0.5] * 3)[0, 0]), -1)


# ---------------------------------------------------------------------------------------------- DeiT III


def test_three_augment_does_what_pillow_does_each_a_third_of_the_time():
    source = image()
    picture, counts = pillow(source), {"grey": 0, "solarised": 0, "blurred": 0}
    grey, solarised = as_int(picture.convert("L").convert("RGB")), as_int(ImageOps.solarize(picture))
    for seed in range(90):
        found = three_augment(source, random.Random(seed)).int()
        if (found - solarised).abs().max() == 0:
            counts["solarised"] += 1
        elif (found - grey).abs().max() <= 1:  # luma in whole steps, cut here and rounded there
            counts["grey"] += 1
        else:
            assert found.float().std() <= source.float().std()  # a radius of 0.1 changes nothing
            counts["blurred"] += 1
    assert all(15 < count < 45 for count in counts.values())


def test_the_simple_crop_keeps_nearly_everything_and_reflects_four_pixels():
    source = image(40, 80)
    found = {simple_crop(source, (40, 40), random.Random(seed))[0].numpy().tobytes() for seed in range(60)}
    assert len(found) > 30
    padded = torch.nn.functional.pad(source[None].float(), (4, 4, 4, 4), mode="reflect")[0].to(torch.uint8)
    windows = padded.unfold(1, 40, 1).unfold(2, 40, 1)[0].reshape(-1, 40, 40)
    assert found <= {window.contiguous().numpy().tobytes() for window in windows}


def test_deit_three_options_reach_the_training_view():
    augment = Augment(simple_crop=True, three_augment=True, flip=0.0)
    plain = Augment(simple_crop=True, flip=0.0)
    for seed in range(4):
        view = finetune_transform(augment, 24)(image(), random.Random(seed))
        assert view.shape == (3, 24, 24)
        assert not torch.equal(view, finetune_transform(plain, 24)(image(), random.Random(seed)))
