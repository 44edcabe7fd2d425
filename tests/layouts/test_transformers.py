"""Names of Hugging Face transformers: there and back, and read by the library itself where it is installed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfseen.config import Model
from halfseen.layouts import LAYOUTS, detect
from halfseen.models import ViT
from halfseen.pretrain.mae import MAE, MAEConfig
from halfseen.pretrain.mim import MIM, MIMConfig
from halfseen.pretrain.targets import Pixels

PLAIN = {"width": 32, "depth": 2, "heads": 2, "patch": 16, "norm_eps": 1e-12}
BEIT = PLAIN | {"key_bias": False, "layer_scale": 0.1, "position": "none"}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def trunk_weights(**options):
    encoder = randomised(ViT(Model(**options), 64))
    return encoder, {f"encoder.{name}": value for name, value in encoder.state_dict().items()}


@pytest.mark.parametrize("layout", ["transformers_vit", "transformers_vit_model"])
def test_a_plain_trunk_comes_back(layout):
    _, weights = trunk_weights(**PLAIN)
    theirs = LAYOUTS[layout].give(weights)
    assert detect(theirs).name == layout
    back = LAYOUTS[layout].take(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize("layout", ["transformers_beit", "transformers_beit_model", "transformers_beit_mim"])
@pytest.mark.parametrize("relative", ["none", "shared", "block"])
def test_a_beit_comes_back(layout, relative):
    encoder = ViT(Model(**BEIT, relative=relative), 64)
    student = randomised(MIM(encoder, MIMConfig(), 8, Pixels(16, True)))
    weights = student.state_dict()
    placed = LAYOUTS[layout].from_ours(set(weights))
    assert {name for name in weights if name not in placed} <= {"head.weight", "head.bias"}
    theirs = LAYOUTS[layout].give(weights)
    assert detect(theirs).name == layout
    back = LAYOUTS[layout].take(theirs)
    assert all(torch.equal(back[name], weights[name]) for name in placed)


def test_an_mae_comes_back():
    weights = randomised(mae()).state_dict()
    theirs = LAYOUTS["transformers_mae"].give(weights)
    assert "decoder.decoder_layers.0.attention.attention.key.bias" in theirs
    assert detect(theirs).name == "transformers_mae"
    back = LAYOUTS["transformers_mae"].take(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def mae():
    encoder = ViT(Model(**PLAIN, position="sincos"), 64)
    return MAE(encoder, MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2), 12, Pixels(16, True))


def test_what_has_no_place_keeps_its_name():
    _, weights = trunk_weights(**PLAIN)
    theirs = LAYOUTS["transformers_vit_model"].give(weights) | {"pooler.dense.weight": torch.ones(2)}
    ours = LAYOUTS["transformers_vit_model"].take(theirs)
    assert set(ours) - set(weights) == {"pooler.dense.weight"}


def read_by(kind, config, theirs, folder):
    """The library's model with these weights from a file, as a user would load it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    made = getattr(transformers, kind)(getattr(transformers, config[0])(**SIZES, **config[1]))
    made.config.save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in theirs.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    model, told = type(made).from_pretrained(folder, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not [name for name in told["missing_keys"] if "pooler" not in name]
    return model.eval()


@torch.no_grad()
def test_the_library_computes_the_same_vit(tmp_path):
    encoder, weights = trunk_weights(**PLAIN)
    model = read_by("ViTModel", ("ViTConfig", {}), LAYOUTS["transformers_vit_model"].give(weights), tmp_path)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image).last_hidden_state, encoder(image), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("relative", "options"),
    [("shared", {"use_shared_relative_position_bias": True}), ("block", {"use_relative_position_bias": True})],
)
def test_the_library_computes_the_same_beit(tmp_path, relative, options):
    encoder = randomised(ViT(Model(**BEIT, relative=relative), 64))
    student = randomised(MIM(encoder, MIMConfig(), 8, Pixels(16, True)))
    theirs = LAYOUTS["transformers_beit_mim"].give(student.state_dict())
    config = {"vocab_size": 768, "use_mask_token": True, "layer_norm_eps": 1e-12} | options
    model = read_by("BeitForMaskedImageModeling", ("BeitConfig", config), theirs, tmp_path)
    image, mask = torch.randn(2, 3, 64, 64), torch.arange(32).view(2, 16) % 2 == 0
    expected = student({"image": image, "mask": mask, "task": "predict"})["prediction"]
    logits = model(image, bool_masked_pos=mask).logits
    torch.testing.assert_close(logits[:, -16:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_library_computes_the_same_mae(tmp_path):
    student = randomised(mae())
    theirs = LAYOUTS["transformers_mae"].give(student.state_dict())
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    options = sizes | {"decoder_intermediate_size": 64, "norm_pix_loss": True}
    model = read_by("ViTMAEForPreTraining", ("ViTMAEConfig", options), theirs, tmp_path)
    image, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, noise.argsort(1)[:, 4:], True)
    seen = model(image, noise=noise)
    prediction = student({"image": image, "mask": mask, "task": "predict"})["prediction"]
    torch.testing.assert_close(seen.logits, prediction, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "model.safetensors").keys() == theirs.keys()
