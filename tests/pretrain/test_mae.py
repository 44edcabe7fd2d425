"""The MAE student: against the plain definition, counts, what may influence what, refusals."""

import pytest
import torch
from torch import nn

from halfseen.config import ConfigError, Model
from halfseen.data.masks import mask_from_noise, random_mask
from halfseen.models import ViT
from halfseen.pretrain.config import Mask
from halfseen.pretrain.mae import MAE, MAEConfig
from halfseen.pretrain.targets import Pixels

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "position": "sincos"}
DECODER = MAEConfig(decoder_width=16, decoder_depth=2, decoder_heads=2)


def build(decoder=DECODER, image_size=32, **options):
    torch.manual_seed(0)
    student = assemble(ViT(Model(**(SMALL | options)), image_size), decoder)
    for parameter in student.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return student


def assemble(encoder, decoder, ratio=0.75):
    return MAE(encoder, decoder, Mask(ratio=ratio).hidden(encoder.tokens), Pixels(encoder.patch, True))


def batch_for(student, size=3):
    torch.manual_seed(1)
    height, width = (side * student.encoder.patch for side in student.encoder.grid)
    image = torch.randn(size, 3, height, width)
    mask = random_mask(0, torch.arange(size), student.encoder.tokens, student.hidden)
    return {"image": image, "mask": mask, "target": Pixels(student.encoder.patch, True)({"image": image})}


def by_definition(student, batch):
    """The paper's order of things: encode, fill in mask tokens, un-shuffle, decode all, average over hidden."""
    encoder, decoder, mask = student.encoder, student.decoder, batch["mask"]
    prefix, rows = encoder.prefix, []
    latent = decoder.embed(encoder(batch["image"], mask, student.visible))
    for sample in range(len(mask)):
        tokens = decoder.mask_token[0].repeat(encoder.tokens, 1)
        tokens[~mask[sample]] = latent[sample, prefix:]
        rows.append(torch.cat([latent[sample, :prefix], tokens]))
    x = torch.stack(rows) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    prediction = decoder.pred(decoder.norm(x))[:, prefix:]
    per_patch = (prediction - batch["target"]).square().mean(-1)
    return prediction, (per_patch * mask).sum() / mask.sum()


VARIANTS = [
    {},
    {"stem": "hmlp"},
    {"class_token": False},
    {"registers": 2},
    {"parallel": 2},
    {"share": 2},
    {"image_size": (24, 40)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_prediction_and_gradients_are_those_of_the_definition(options):
    student = build(**options)
    batch = batch_for(student)
    prediction, loss = by_definition(student, batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad}
    student.zero_grad()
    ours = student(batch)["loss"]
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        ours_too = student.get_parameter(name).grad
        torch.testing.assert_close(ours_too, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    predicted = student({**batch, "task": "predict"})
    torch.testing.assert_close(predicted["prediction"], prediction, rtol=1e-3, atol=1e-4)
    assert predicted["latent"].shape == (3, student.encoder.prefix + student.visible, 32)


def test_a_decoder_of_one_block_agrees_too():
    student = build(MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2))
    batch = batch_for(student)
    torch.testing.assert_close(student(batch)["loss"], by_definition(student, batch)[1], rtol=1e-5, atol=0)


def test_predictions_need_no_target():
    student = build()
    batch = batch_for(student)
    del batch["target"]
    assert student({**batch, "task": "predict"})["prediction"].shape == (3, 16, 192)


def test_targets_of_visible_patches_do_not_count():
    student = build()
    batch = batch_for(student)
    before = student(batch)["loss"]
    batch["target"] = torch.where(batch["mask"][:, :, None], batch["target"], torch.tensor(1e6))
    assert torch.equal(student(batch)["loss"], before)


def test_hidden_pixels_reach_the_loss_only_through_the_target():
    student = build(stem="hmlp")
    batch = batch_for(student)
    before = student(batch)["loss"]
    cover = batch["mask"].view(3, 1, 4, 1, 4, 1).expand(-1, 3, -1, 8, -1, 8).reshape(batch["image"].shape)
    batch["image"] = torch.where(cover, torch.randn_like(batch["image"]), batch["image"])
    assert torch.equal(student(batch)["loss"], before)


def test_masks_from_given_noise_are_accepted():
    student = build()
    noise = torch.rand(3, 16)
    batch = batch_for(student) | {"mask": mask_from_noise(noise, student.hidden)}
    assert student(batch)["loss"].isfinite()


@pytest.mark.parametrize(("size", "ratio", "visible"), [(224, 0.75, 49), (64, 0.6, 6), (48, 0.75, 2)])
def test_the_visible_count_is_rounded_down(size, ratio, visible):
    with torch.device("meta"):
        student = assemble(ViT(Model(size="ti", position="sincos"), size), MAEConfig(), ratio)
    assert student.visible == visible
    assert student.hidden + visible == student.encoder.tokens


@pytest.mark.parametrize(
    ("size", "total", "decoder"),
    [
        ("b", 111_907_840, 26_109_184),
        ("l", 329_541_888, 26_240_256),
        ("h", 657_074_508, 26_309_708),
    ],
)
def test_parameter_counts_are_the_published_ones(size, total, decoder):
    with torch.device("meta"):
        student = assemble(ViT(Model(size=size, position="sincos"), 224), MAEConfig())
    assert sum(p.numel() for p in student.parameters()) == total
    assert sum(p.numel() for p in student.decoder.parameters()) == decoder
    if size == "b":
        assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 111_655_680


def test_flops_are_the_published_work_less_what_is_left_out():
    with torch.device("meta"):
        student = assemble(ViT(Model(size="b", position="sincos"), 224), MAEConfig())
    # 58.7 GFLOP by the definition; the last block and the head skip visible tokens: 2.5 % less.
    assert student.train_flops_per_image() / 1e9 == pytest.approx(58.7 * 0.975, rel=0.005)


def test_every_trained_parameter_has_a_gradient_and_positions_are_frozen():
    student = build(registers=1)
    student(batch_for(student))["loss"].backward()
    idle = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert idle == ["encoder.pos_embed", "decoder.pos_embed"]


def test_the_loss_is_float32_under_autocast():
    student = build()
    batch = batch_for(student)
    exact = student(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        low = student(batch)["loss"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0)


def test_blocks_are_the_units_of_engines():
    student = build(depth=4, share=2)
    assert student.blocks() == [*student.encoder.blocks, *student.decoder.blocks]


@pytest.mark.parametrize(
    ("options", "key"),
    [({"stem": "conv"}, "model.stem"), ({"stem": "hmlp", "stem_norm": "batch"}, "model.stem_norm")],
)
def test_leaking_stems_are_refused(options, key):
    with pytest.raises(ConfigError) as refused:
        build(**options)
    assert refused.value.key == key
    assert "model.stem" in refused.value.fix


def test_a_ratio_that_leaves_nothing_visible_is_refused():
    with pytest.raises(ConfigError, match=r"mask\.ratio"):
        Mask(ratio=0.95).hidden(16)


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (MAEConfig(decoder_heads=7), "objective.mae.decoder_heads"),
        (MAEConfig(decoder_width=18, decoder_heads=2), "objective.mae.decoder_width"),
        (MAEConfig(decoder_depth=0), "objective.mae.decoder_depth"),
    ],
)
def test_impossible_decoders_are_refused(cfg, key):
    with pytest.raises(ConfigError) as refused:
        cfg.check("objective.mae")
    assert refused.value.key == key


@pytest.mark.parametrize("mask", [Mask(ratio=1.0), Mask(ratio=0.0), Mask(count=0)])
def test_impossible_masks_are_refused(mask):
    with pytest.raises(ConfigError, match=r"^mask\."):
        mask.check("mask")
