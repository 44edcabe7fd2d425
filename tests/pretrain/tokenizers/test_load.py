"""Tokenizers from runs and files: the codes that were trained are the codes that come back."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfseen.config import ConfigError, Model
from halfseen.layouts import LAYOUTS, detect
from halfseen.models import ViT
from halfseen.pretrain import tokenizers, train
from halfseen.pretrain.tokenizers import Coder, DallE
from halfseen.pretrain.tokenizers.quantizer import QuantizerConfig
from halfseen.tools.architecture import Architecture

SMALL = {
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch": 8,
    "data.train": "embedded:emoji/train",
    "data.val": "null",
    "data.image_size": 32,
    "data.workers": 0,
    "run.images": 8,
    "run.global_batch": 4,
    "run.checkpoint_every": 8,
    "optim.warmup": 4,
    "engine.name": "single",
    "engine.device": "cpu",
    "engine.precision": "fp32",
    "monitor.tensorboard": "false",
}
VQKD = {
    "objective.vqkd.decoder_width": 16,
    "objective.vqkd.decoder_depth": 1,
    "objective.vqkd.decoder_heads": 2,
    "objective.vqkd.quantizer.codes": 12,
    "objective.vqkd.quantizer.width": 4,
    "objective.vqkd.quantizer.start_images": 2,
    "target.name": "pixels",
}
DVAE = {"objective.dvae.codes": 12, "objective.dvae.width": 8, "objective.dvae.channels": 8}


@pytest.mark.parametrize(("recipe", "own", "size"), [("vqkd_b", VQKD, 32), ("dvae", DVAE, None)])
def test_a_runs_tokenizer_gives_the_runs_codes(recipe, own, size, tmp_path):
    given = SMALL | own | {"run.folder": tmp_path}
    assert train.main([f"pretrain/{recipe}", *(f"{key}={value}" for key, value in given.items())]) == 0
    tokenizer = tokenizers.load(str(tmp_path))
    assert (tokenizer.codes, tokenizer.patch, tokenizer.image_size) == (12, 8, size)
    assert tokenizer.statistics == ([0.5] * 3, [0.5] * 3)
    (checkpoint,) = (tmp_path / "checkpoints").glob("img_*")
    image = torch.randn(2, 3, 32, 32)
    again = tokenizers.load(str(checkpoint)).module.eval().codes(image)
    assert torch.equal(tokenizer.module.eval().codes(image), again)
    assert again.shape == (2, 16)


@pytest.fixture
def coder():
    torch.manual_seed(0)
    trunk = ViT(Model(width=128, depth=2, heads=2, patch=8, key_bias=False), 32)
    return Coder(trunk, QuantizerConfig(codes=12, width=4)).eval()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_an_official_file_is_read_by_its_tensors_alone(coder, suffix, tmp_path):
    official = LAYOUTS["vqkd"].give(coder.state_dict())
    assert detect(official).name == "vqkd"
    path = tmp_path / f"vqkd.{suffix}"
    if suffix == "pth":
        torch.save({"model": official}, path)
    else:
        save_file(official, path)
    tokenizer = tokenizers.load(str(path))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokenizer.module.eval().codes(image), coder.codes(image))
    assert (tokenizer.codes, tokenizer.patch, tokenizer.image_size) == (12, 8, 32)
    assert tokenizer.statistics == ((0.5,) * 3, (0.5,) * 3)


def test_heads_can_be_told_where_they_are_not_one_per_64_channels(coder, tmp_path):
    save_file(coder.state_dict(), tmp_path / "ours.safetensors")
    module = tokenizers.load(str(tmp_path / "ours.safetensors"), heads=4).module
    assert module.encoder.blocks[0].attn.heads == 4


def test_a_converted_file_tells_its_own_trunk_and_images(tmp_path):
    model = Model(width=48, depth=1, heads=3, patch=8, key_bias=False, layer_scale=0.1, position="sincos")
    ours = Coder(ViT(model, 32), QuantizerConfig(codes=12, width=4)).eval()
    statistics = {"mean": [0.4] * 3, "std": [0.2] * 3}
    told = Architecture(model, 32, "the run's config", "pretrain", statistics).described()
    path = tmp_path / "ours.safetensors"
    save_file(ours.state_dict(), path, told)
    tokenizer = tokenizers.load(str(path))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(tokenizer.module.eval().codes(image), ours.codes(image))
    assert tokenizer.statistics == ([0.4] * 3, [0.2] * 3)
    assert tokenizer.image_size == 32


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"width": 48, "heads": 3}, "target.codes.heads", "48 channels"),
        ({"layer_scale": 0.1}, "target.codes.tokenizer", "nothing tells"),
        ({"position": "none", "relative": "shared"}, "target.codes.tokenizer", "nothing tells"),
    ],
)
def test_a_file_that_leaves_its_trunk_open_is_refused(options, key, words, tmp_path):
    model = Model(**{"width": 64, "depth": 1, "heads": 1, "patch": 8, "key_bias": False} | options)
    save_file(Coder(ViT(model, 32), QuantizerConfig(codes=12, width=4)).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=words) as refused:
        tokenizers.load(str(tmp_path / "a.safetensors"))
    assert refused.value.key == key


def test_dalles_state_dict_gives_its_codes(tmp_path):
    torch.manual_seed(0)
    encoder = DallE(width=8, blocks=2, codes=20)
    official = LAYOUTS["dalle"].give(encoder.state_dict())
    assert {"blocks.input.w", "blocks.group_4.block_2.res_path.conv_4.b", "blocks.output.conv.w"} < official.keys()
    assert len(official) == len(encoder.state_dict())
    torch.save(official, tmp_path / "encoder.pth")
    tokenizer = tokenizers.load(str(tmp_path / "encoder.pth"))
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(tokenizer.module.codes(image), encoder.codes(image))
    assert (tokenizer.patch, tokenizer.image_size, tokenizer.statistics) == (8, None, ((0.0,) * 3, (1.0,) * 3))


def test_a_pickled_module_is_refused_with_the_safe_way(tmp_path):
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ConfigError, match=r"torch\.save its state_dict"):
        tokenizers.load(str(tmp_path / "encoder.pkl"))


def test_what_is_no_tokenizer_is_refused(coder, tmp_path):
    save_file({"blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match="weights of timm"):
        tokenizers.load(str(tmp_path / "vit.safetensors"))
    with pytest.raises(ConfigError, match="names no tokenizer"):
        tokenizers.load("")
    with pytest.raises(ConfigError, match="no such file"):
        tokenizers.load(str(tmp_path / "nothing"))
    broken = coder.state_dict()
    broken["quantizer.codebook"] = broken["quantizer.codebook"] * torch.nan
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ConfigError, match="NaN"):
        tokenizers.load(str(tmp_path / "broken.safetensors"))
    del broken["quantizer.usage"]
    save_file(broken, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match="does not fit"):
        tokenizers.load(str(tmp_path / "part.safetensors"))
    assert load_file(tmp_path / "part.safetensors")
