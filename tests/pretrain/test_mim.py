"""The student with mask tokens: against the plain definition, uneven masks, what may influence what."""

import pytest
import torch
from torch import nn

from halfseen.config import Model
from halfseen.data.masks import block_masks, random_mask
from halfseen.models import ViT
from halfseen.pretrain.initial import initialise_trunk
from halfseen.pretrain.mim import MIM, Compared, MIMConfig
from halfseen.pretrain.targets import Pixels

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "position": "learned"}
TOKENS, HIDDEN = 16, 6


def build(hidden=HIDDEN, mean="image", image_size=32, **options):
    torch.manual_seed(0)
    trunk = ViT(Model(**(SMALL | options)), image_size)
    student = MIM(trunk, MIMConfig(mean=mean), hidden, Pixels(8, False))
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student


def batch_for(student, size=3, mask=None):
    torch.manual_seed(1)
    image = torch.randn(size, 3, *(side * 8 for side in student.encoder.grid))
    if mask is None:
        mask = random_mask(0, torch.arange(size), student.encoder.tokens, student.hidden)
    return {"image": image, "mask": mask, "target": Pixels(8, False)({"image": image})}


def uneven(student, size=4):
    mask = torch.zeros(size, student.encoder.tokens, dtype=torch.bool)
    for row in range(size):
        mask[row, torch.randperm(student.encoder.tokens)[: student.hidden - row]] = True
    return mask


def by_definition(student, batch):
    """BEiT's order: stem, mask tokens, positions, class token, blocks, norm, head; the mean over hidden patches."""
    trunk = student.encoder
    x = trunk.patch_embed(batch["image"])
    x = torch.where(batch["mask"][:, :, None], student.mask_token, x)
    if trunk.pos_embed is not None:
        x = x + trunk.pos_embed[:, trunk.position_rows :]
    first = []
    if trunk.cls_token is not None:
        placed = trunk.pos_embed is not None and trunk.position_rows
        first.append(trunk.cls_token + trunk.pos_embed[:, :1] if placed else trunk.cls_token)
    first += [trunk.reg_token] if trunk.reg_token is not None else []
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], dim=1)
    places = trunk.places()
    for block in trunk.blocks:
        x = block(x, places=places)
    prediction = student.head(trunk.norm(x)[:, trunk.prefix :])
    per_patch = (prediction - batch["target"]).square().mean(-1)
    return prediction, per_patch[batch["mask"]].mean()


VARIANTS = [
    {},
    {"position": "none", "relative": "shared", "key_bias": False},
    {"position": "sincos", "relative": "block", "registers": 2},
    {"stem": "hmlp", "class_token": False},
    {"stem": "conv"},
    {"share": 2, "layer_scale": 0.3},
    {"parallel": 2},
    {"image_size": (24, 40)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_prediction_and_gradients_are_those_of_the_definition(options):
    student = build(**options)
    batch = batch_for(student)
    prediction, loss = by_definition(student, batch)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss, trained.values())
    ours = student(batch)["loss"]
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    for name, gradient, other in zip(trained, torch.autograd.grad(ours, trained.values()), expected):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    predicted = student({**batch, "task": "predict"})
    torch.testing.assert_close(predicted["prediction"], prediction, rtol=1e-3, atol=1e-4)


def test_uneven_masks_count_by_image_or_by_patch():
    batch = batch_for(build(), 4, uneven(build()))
    prediction, by_patch = by_definition(build(mean="patch"), batch)
    errors = (prediction - batch["target"]).square().mean(-1)
    by_image = torch.stack([row[mask].mean() for row, mask in zip(errors, batch["mask"])]).mean()
    torch.testing.assert_close(build(mean="patch")(batch)["loss"], by_patch, rtol=1e-5, atol=0)
    torch.testing.assert_close(build(mean="image")(batch)["loss"], by_image, rtol=1e-5, atol=0)
    assert not torch.isclose(by_patch, by_image, rtol=1e-4)


def test_the_mean_over_images_does_not_depend_on_how_a_batch_is_split():
    student = build(mean="image")
    batch = batch_for(student, 4, uneven(student))
    halves = [student({name: value[part] for name, value in batch.items()}) for part in (slice(0, 2), slice(2, 4))]
    mean = (halves[0]["loss"] + halves[1]["loss"]) / 2
    torch.testing.assert_close(student(batch)["loss"], mean, rtol=1e-5, atol=0)


def test_an_image_without_hidden_patches_counts_nothing_and_breaks_nothing():
    student = build()
    mask = uneven(student)
    mask[0] = False
    batch = batch_for(student, 4, mask)
    before = student(batch)["loss"]
    batch["target"][0] += 100
    assert torch.equal(student(batch)["loss"], before)
    assert before.isfinite()


def test_hidden_pixels_and_visible_targets_do_not_reach_the_loss():
    student = build(stem="hmlp")
    batch = batch_for(student)
    before = student(batch)["loss"]
    cover = batch["mask"].view(3, 1, 4, 1, 4, 1).expand(-1, 3, -1, 8, -1, 8).reshape(batch["image"].shape)
    batch["image"] = torch.where(cover, torch.randn_like(batch["image"]), batch["image"])
    batch["target"] = torch.where(batch["mask"][:, :, None], batch["target"], torch.tensor(1e6))
    assert torch.equal(student(batch)["loss"], before)


def test_with_nothing_hidden_all_patches_count_and_there_is_no_mask_token():
    student = build(hidden=0)
    batch = batch_for(student, 2, torch.zeros(2, TOKENS, dtype=torch.bool))
    assert student.mask_token is None
    prediction = student({**batch, "task": "predict"})["prediction"]
    expected = (prediction - batch["target"]).square().mean()
    torch.testing.assert_close(student(batch)["loss"], expected, rtol=1e-5, atol=0)


def test_a_step_never_asks_the_device_how_many_patches_are_hidden():
    # On the meta device there are no numbers: whatever needs one on the host raises.
    student = build().to("meta")
    batch = {name: value.to("meta") for name, value in batch_for(build(), 4, uneven(build())).items()}
    student(batch)["loss"].backward()
    assert student.mask_token.grad.shape == (1, 1, 32)


@pytest.mark.parametrize("exact", [True, False])
def test_block_masks_fit(exact):
    student = build(hidden=8)
    mask = block_masks(3, range(6), (4, 4), 8, smallest=2, exact=exact)
    compared = Compared.of(mask, 8, student.visible, "image")
    weight = torch.zeros(6, TOKENS).scatter_(1, compared.index, compared.weight)
    assert torch.equal(weight > 0, mask)
    torch.testing.assert_close(weight.sum(1), torch.full((6,), 1 / 6))


def test_beits_weights_are_narrow_and_later_blocks_quieter():
    torch.manual_seed(0)
    trunk = ViT(Model(width=128, depth=4, heads=2, patch=16, key_bias=False), 32)
    initialise_trunk(trunk)
    for parameter in trunk.parameters():
        if parameter.ndim > 1:
            assert parameter.abs().max() <= 0.02
    # A normal cut off at one deviation has 0.54 of its deviation.
    assert trunk.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02 * 0.54, rel=0.02)
    for layer, block in enumerate(trunk.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 * 0.54 / (2 * layer) ** 0.5, rel=0.03)


def test_the_work_counted_is_all_tokens_and_hidden_predictions():
    student = build()
    trunk, head = student.encoder.flops(), 2 * HIDDEN * 32 * 192
    assert student.train_flops_per_image() == 3 * (trunk + head)
    assert student.blocks() == list(student.encoder.blocks)
