"""Mixing and erasing are functions of (seed, position): the split changes nothing, or is refused."""

import ast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfseen.classification.mixing import (
    NOTHING,
    check_split,
    draw,
    draw_block,
    draw_erasure,
    erase,
    inside_box,
    mix_images,
    mix_targets,
    normal,
    resolve_stride,
    soft_targets,
)
from halfseen.config import Augment, ConfigError
from halfseen.derived import Batches

BOTH = Augment(mixup=0.8, cutmix=1.0)
SIDE = 8


def images(position):
    """A different picture for each position."""
    return normal(1, position, 3 * SIDE * SIDE, "picture").view(-1, 3, SIDE, SIDE)


def mixed(position, stride, augment=BOTH, seed=5):
    mix = draw(position, seed=seed, stride=stride, augment=augment, side=SIDE)
    image = erase(images(position), position, seed=seed, probability=0.5)
    return mix_images(image, mix), mix_targets(soft_targets(position % 7, 7, 0.1), mix)


def micro_batches(batches, start=0):
    """Positions of one step, as the loader deals them out: p mod world is the rank."""
    for rank in range(batches.world):
        share = torch.arange(start + rank, start + batches.total, batches.world)
        yield from share.split(batches.micro)


def compare_with_the_whole_step(stride, batches, start):
    """The definition is the whole step at once, here in descending order; every micro-batch must agree."""
    position = torch.arange(start, start + batches.total).flip(0)
    image, target = mixed(position, stride)
    for part in micro_batches(batches, start):
        part_image, part_target = mixed(part, stride)
        rows = start + batches.total - 1 - part
        assert torch.equal(part_image, image[rows])
        assert torch.equal(part_target, target[rows])


@settings(max_examples=20, deadline=None)
@given(
    world=st.integers(1, 6),
    half=st.integers(1, 4),
    times=st.integers(1, 3),
    parts=st.integers(1, 3),
    step=st.integers(0, 2),
)
def test_a_split_that_keeps_pairs_together_is_accepted_and_mixes_alike(world, half, times, parts, step):
    batches = Batches(world * 2 * half * times * parts, world, 2 * half * times, parts)
    check_split(world * half, batches, repeats=1)
    compare_with_the_whole_step(world * half, batches, step * batches.total)


@settings(max_examples=40, deadline=None)
@given(world=st.integers(1, 8), micro=st.integers(1, 24), parts=st.integers(1, 3), stride=st.integers(0, 16))
def test_any_other_split_is_refused_or_mixes_alike(world, micro, parts, stride):
    batches = Batches(world * micro * parts, world, micro, parts)
    try:
        stride = resolve_stride(batches.total, stride)
        check_split(stride, batches, repeats=1)
    except ConfigError:
        return
    compare_with_the_whole_step(stride, batches, batches.total)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32, 64])
def test_a_batch_of_1024_mixes_alike_on_1_to_64_ranks(world):
    batches = Batches.derive(1024, world, None)
    stride = resolve_stride(1024, 0)
    check_split(stride, batches, repeats=1)
    whole = draw(torch.arange(1024), seed=0, stride=stride, augment=BOTH, side=224)
    for part in micro_batches(batches):
        mix = draw(part, seed=0, stride=stride, augment=BOTH, side=224)
        assert torch.equal(part[mix.partner], whole.partner[part])
        assert torch.equal(mix.label, whole.label[part])
        assert torch.equal(mix.box, whole.box[part])


def test_pairs_are_mutual_and_never_an_image_with_itself():
    position = torch.arange(64)
    partner = draw(position, seed=0, stride=8, augment=BOTH, side=SIDE).partner
    assert torch.equal(partner[partner], position)
    assert ((partner - position).abs() == 8).all()


@pytest.mark.parametrize(
    ("stride", "world", "micro", "repeats"),
    [(64, 1, 32, 1), (8, 16, 8, 1), (8, 3, 16, 1), (8, 1, 16, 9), (1, 1, 5, 1)],
)
def test_a_split_that_parts_a_pair_is_refused_with_a_stride_that_works(stride, world, micro, repeats):
    batches = Batches(world * micro, world, micro, 1)
    with pytest.raises(ConfigError) as refusal:
        check_split(stride, batches, repeats)
    assert "task.mix_stride" in str(refusal.value)
    assert "fix:" in str(refusal.value)
    if "new run use one of" in str(refusal.value):
        for better in ast.literal_eval(str(refusal.value).split("use one of ")[1].split("]")[0] + "]"):
            check_split(better, batches, repeats)
    else:
        assert micro % 2 or repeats > micro // 2


def test_a_missing_partner_is_an_error_not_another_partner():
    with pytest.raises(ValueError, match="position 8 is not in this micro-batch"):
        draw(torch.arange(8), seed=0, stride=8, augment=BOTH, side=SIDE)


def test_the_stride_comes_from_the_global_batch_alone():
    assert [resolve_stride(batch, 0) for batch in (4096, 1024, 96, 6, 2)] == [64, 64, 16, 1, 1]
    assert resolve_stride(1024, 24) == 24
    with pytest.raises(ConfigError, match="odd"):
        resolve_stride(7, 0)


def test_mixup_is_the_weighted_mean_of_images_and_targets():
    position = torch.arange(4)
    mix = draw(position, seed=3, stride=2, augment=Augment(mixup=0.8), side=SIDE)
    image, target = images(position), soft_targets(position, 5, 0.1)
    weight = mix.label[0].item()
    assert 0 < weight < 1
    assert torch.equal(mix.label, mix.pixel)
    other = [2, 3, 0, 1]
    assert torch.allclose(mix_images(image, mix), weight * image + (1 - weight) * image[other])
    assert torch.allclose(mix_targets(target, mix), weight * target + (1 - weight) * target[other])
    assert torch.allclose(mix_targets(target, mix).sum(1), torch.ones(4))


def test_cutmix_pastes_a_box_and_its_label_share_is_the_share_of_pixels():
    position = torch.arange(256)
    mix = draw(position, seed=3, stride=4, augment=Augment(cutmix=1.0), side=SIDE)
    image = images(position)
    result = mix_images(image, mix)
    own = (result == image).all(1)
    assert ((result == image[mix.partner]).all(1) | own).all(), "every pixel comes whole from one of the two"
    assert torch.allclose(own.float().mean((1, 2)), mix.label)
    assert 0.2 < 1 - mix.label.mean() < 0.6


def test_shares_of_mixed_blocks_and_of_cutmix_follow_the_probabilities():
    augment = Augment(mixup=0.8, cutmix=1.0, mix_probability=0.5, switch_probability=0.25)
    drawn = [draw_block(0, block, augment, 224) for block in range(2000)]
    untouched = sum(entry == (1.0, 1.0, NOTHING) for entry in drawn)
    cut = sum(entry[2] != NOTHING for entry in drawn)
    assert 900 < untouched < 1110
    assert 190 < cut < 310
    assert 0.45 < sum(entry[0] for entry in drawn if entry[1] < 1) / sum(entry[1] < 1 for entry in drawn) < 0.55


def test_another_seed_mixes_otherwise():
    position = torch.arange(16)
    one, two = (draw(position, seed=seed, stride=8, augment=Augment(mixup=0.8), side=SIDE) for seed in (1, 2))
    assert not torch.equal(one.label, two.label)


def test_soft_targets_equal_the_label_smoothing_of_torch():
    logits, label = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])
    target = soft_targets(label, 5, 0.1).double()
    ours = torch.nn.functional.cross_entropy(logits, target)
    theirs = torch.nn.functional.cross_entropy(logits, label, label_smoothing=0.1)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_erasing_fills_one_box_with_noise_and_leaves_the_rest():
    position = torch.arange(400)
    image = torch.full((400, 3, 16, 16), 9.0)
    result = erase(image, position, seed=0, probability=0.25)
    touched = (result != image).any(1)
    erased = touched.flatten(1).any(1)
    assert 70 < erased.sum() < 130
    for row in erased.nonzero()[:, 0].tolist():
        top, left, bottom, right = *touched[row].nonzero().amin(0), *touched[row].nonzero().amax(0)
        assert touched[row].sum() == (bottom - top + 1) * (right - left + 1)
        assert touched[row].float().mean() < 0.4
    noise = result[result != image]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert (image == 9).all(), "the input is left alone"


def test_nothing_is_erased_at_probability_zero():
    image = torch.zeros(4, 3, 8, 8)
    assert erase(image, torch.arange(4), seed=0, probability=0.0) is image
    assert draw_erasure(0, 3, 0.0, 8, 8) == NOTHING


def test_boxes():
    inside = inside_box(torch.tensor([[1, 3, 0, 2], [0, 0, 0, 0]]), 4, 5)
    assert inside.shape == (2, 1, 4, 5)
    assert inside[0, 0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert not inside[1].any()
