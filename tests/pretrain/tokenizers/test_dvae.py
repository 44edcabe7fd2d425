"""The discrete VAE, and DALL-E's encoder as its authors describe it."""

import pytest
import torch

from halfseen.config import ConfigError
from halfseen.pretrain.patches import patchify
from halfseen.pretrain.targets import Pixels
from halfseen.pretrain.tokenizers import DVAE, DallE, DVAEConfig

SMALL = DVAEConfig(codes=12, width=6, channels=8, blocks=2, kl=0.1)


def build(cfg=SMALL, patch=8):
    torch.manual_seed(0)
    return DVAE(cfg, patch, (4, 4), Pixels(patch, False))


def batch_for(student, size=2):
    image = torch.randn(size, 3, 4 * student.patch, 4 * student.patch)
    return {"image": image, "target": patchify(image, student.patch)}


@pytest.mark.parametrize("patch", [2, 8])
def test_one_code_per_patch_and_a_picture_back(patch):
    student = build(patch=patch)
    predicted = student({**batch_for(student), "task": "predict"})
    assert predicted["codes"].shape == (2, 16)
    assert predicted["prediction"].shape == (2, 16, 3 * patch * patch)
    image = torch.randn(1, 3, 4 * patch, 4 * patch)
    assert torch.equal(student.codes(image), student({"image": image, "task": "predict"})["codes"])


@pytest.mark.parametrize("kind", ["own", "dalle"])
def test_codes_are_chosen_in_float32_under_autocast(kind):
    torch.manual_seed(0)
    tokenizer = DallE(32, 1, 8192) if kind == "dalle" else build(DVAEConfig(codes=4096, width=6, channels=32))
    image = torch.rand(4, 3, 64, 64)
    exact = tokenizer.codes(image)
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.codes(image)
        trunk = tokenizer.encoder if kind == "own" else lambda image: tokenizer(image).bfloat16()
        rounded = trunk(image).argmax(1).flatten(1)
    assert (codes != exact).sum() < (rounded != exact).sum()


def test_loss_is_reconstruction_and_the_pull_to_even_use():
    student = build()
    scalars = student(batch_for(student))
    torch.testing.assert_close(scalars["loss"], scalars["reconstruction"] + 0.1 * scalars["kl"])
    with torch.no_grad():  # all codes equally likely: nothing to pull
        for part in (student.encoder[-1].weight, student.encoder[-1].bias):
            part.zero_()
    even = student(batch_for(student))
    assert even["kl"].abs() < 1e-5
    assert even["code_perplexity"].item() == pytest.approx(12, rel=1e-4)


def test_it_learns():
    student = build(DVAEConfig(codes=12, width=6, channels=16))
    batch = batch_for(student, 4)
    batch["image"] = batch["image"].mean((2, 3), keepdim=True).expand(-1, -1, 32, 32) * 20
    batch["target"] = patchify(batch["image"], 8)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = student(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_parameter_has_a_gradient_and_blocks_are_modules_of_it():
    student = build()
    student(batch_for(student))["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert set(student.blocks()) < set(student.modules())
    assert student.train_flops_per_image() > 0


def test_a_patch_that_cannot_be_halved_down_to_is_refused():
    with pytest.raises(ConfigError, match=r"model\.patch"):
        build(patch=14)


def test_dalle_has_the_published_structure():
    with torch.device("meta"):
        encoder = DallE()
    # A 7x7 stem, four groups of two blocks of 256 to 2048 channels, 8192 codes.
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes["input.weight"] == (256, 3, 7, 7)
    assert shapes["groups.3.0.res_path.conv_1.weight"] == (512, 1024, 3, 3)
    assert shapes["groups.3.1.res_path.conv_4.weight"] == (2048, 512, 1, 1)
    assert shapes["groups.1.0.id_path.weight"] == (512, 256, 1, 1)
    assert "groups.0.0.id_path.weight" not in shapes
    assert shapes["output.weight"] == (8192, 2048, 1, 1)
    assert len(encoder.groups) == 4
    assert all(len(group) == 2 for group in encoder.groups)
    assert encoder.groups[0][0].gain == 1 / 64


def test_dalle_gives_one_code_per_eight_pixels_of_images_from_0_to_1():
    torch.manual_seed(0)
    encoder = DallE(width=8, blocks=1, codes=20)
    image = torch.rand(2, 3, 32, 24)
    logits = encoder(image)
    assert logits.shape == (2, 20, 4, 3)
    assert torch.equal(encoder.codes(image), logits.argmax(1).flatten(1))
    # Pixels are squeezed into 0.1 .. 0.9 before the first convolution.
    seen = []
    encoder.input.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16))
    assert seen[0].unique().tolist() == pytest.approx([0.1, 0.9])
