"""SimMIM on Swin: the published loss, what may influence what, units of any size."""

import pytest
import torch
from torch.nn import functional as F

from halfseen.config import ConfigError
from halfseen.models.swin import Swin, SwinConfig
from halfseen.pretrain import masks, objectives
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.mim import MIMConfig
from halfseen.pretrain.simmim import SimMIM
from halfseen.pretrain.targets import HOG, Pixels
from halfseen.recipes import load

TRUNK = SwinConfig(width=16, depths=[2, 2], heads=[2, 4], window=4)  # a place of the last stage is 8 pixels


def student(unit=8, hidden=40, target=None):
    torch.manual_seed(0)
    made = SimMIM(Swin(TRUNK, 64), MIMConfig(), hidden, target or Pixels(unit, False, "absolute"), unit)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def batch_for(unit=8, hidden=40, size=2):
    torch.manual_seed(1)
    image = torch.randn(size, 3, 64, 64)
    side = 64 // unit
    mask = torch.zeros(size, side**2, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(side**2)[:hidden]] = True
    return {"image": image, "mask": mask, "target": Pixels(unit, False)({"image": image})}


def pixels_of(mask, unit):
    side = 64 // unit
    return mask.view(-1, 1, side, side).float().repeat_interleave(unit, 2).repeat_interleave(unit, 3)


@pytest.mark.parametrize(("unit", "hidden"), [(8, 40), (4, 100)])
def test_the_loss_is_the_published_one(unit, hidden):
    made, batch = student(unit, hidden), batch_for(unit, hidden)
    image, cover = batch["image"], pixels_of(batch["mask"], unit)
    tokens = made.encoder(image, batch["mask"], mask_token=made.mask_token)
    # Rows of a pixel shuffle are ordered channel, row, column; the head's row, column, channel.
    head = made.head.weight.view(8, 8, 3, -1).movedim(2, 0).reshape(192, -1, 1, 1)
    bias = made.head.bias.view(8, 8, 3).movedim(2, 0).reshape(-1)
    drawn = F.pixel_shuffle(F.conv2d(tokens.transpose(1, 2).unflatten(2, (8, 8)), head, bias), 8)
    expected = ((drawn - image).abs() * cover).sum() / (cover.sum() + 1e-5) / 3
    torch.testing.assert_close(made(batch)["loss"], expected, rtol=1e-5, atol=0)
    prediction = made(batch | {"task": "predict"})["prediction"]
    assert prediction.shape == batch["target"].shape


@pytest.mark.parametrize("unit", [8, 4])
def test_hidden_pixels_reach_the_loss_only_through_the_target(unit):
    made, batch = student(unit), batch_for(unit)
    before = made(batch)["loss"]
    cover = pixels_of(batch["mask"], unit).bool()
    changed = batch | {"image": torch.where(cover, torch.randn_like(batch["image"]), batch["image"])}
    assert torch.equal(made(changed)["loss"], before)
    other = batch | {"image": torch.where(cover, batch["image"], torch.randn_like(batch["image"]))}
    assert not torch.equal(made(other)["loss"], before)


def test_any_target_is_predicted_at_the_last_stages_places():
    target = HOG(8)
    made, batch = student(target=target), batch_for()
    batch["target"] = target(batch)
    assert made(batch | {"task": "predict"})["prediction"].shape == (2, 64, 27)
    assert made(batch)["loss"] > 0


@pytest.mark.parametrize(("unit", "target"), [(4, HOG(8)), (16, None), (6, None), (2, None)])
def test_units_the_trunk_cannot_answer_are_refused(unit, target):
    with pytest.raises(ConfigError, match="answers every 8 pixels from patches of 4"):
        student(unit, 4, target)


@pytest.mark.parametrize(("cell", "patch"), [(64, 32), (32, 32), (16, 16)])
def test_a_recipes_cells_become_units(cell, patch):
    config = load(Pretrain, "pretrain/simmim_swin_b", [f"mask.cell={cell}", "swin.width=8", "swin.heads=[1,1,1,1]"])
    assert config.patch == patch
    assert config.grid == (192 // patch, 192 // patch)
    hidden = masks.hidden(config)
    mask = masks.create(config)(0, torch.arange(3))
    assert (mask.sum(1) == hidden).all()
    assert objectives.create(config, Pixels(patch, False, "absolute")).unit == patch


def test_other_objectives_refuse_a_swin():
    with pytest.raises(ConfigError, match="needs a trunk of one resolution"):
        load(Pretrain, "pretrain/mae_b16", ["trunk=swin"])
