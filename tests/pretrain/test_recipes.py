"""Every bundled pretraining recipe takes two steps with only its size and its data changed: none can rot."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.pretrain import train
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.tokenizers import Coder
from halfseen.pretrain.tokenizers.quantizer import QuantizerConfig
from halfseen.recipes import load, recipes

NAMES = [name for name, _ in recipes() if name.startswith("pretrain/")]
SIDE, PATCH = 64, 8  # pixels of the images, and of a patch
TOKENS = (SIDE // PATCH) ** 2

SMALL = {
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch": PATCH,
    "data.train": "embedded:emoji/train",
    "data.val": "null",
    "data.image_size": SIDE,
    "data.workers": 0,
    "run.images": 8,
    "run.global_batch": 4,
    "run.checkpoint_every": 8,
    "run.log_every": 4,
    "run.picture_every": 8,
    "optim.warmup": 4,
    "engine.name": "single",
    "engine.device": "cpu",
    "monitor.tensorboard": "false",
}
TEACHER = "target.features.teacher"
# Sizes of what an objective or a target has beside the trunk.
BESIDE = {
    "mae": {"objective.mae.decoder_width": 16, "objective.mae.decoder_depth": 1, "objective.mae.decoder_heads": 2},
    "beit2": {"objective.beit2.early": 1, "objective.beit2.extra": 1},
    "vqkd": {
        "objective.vqkd.decoder_width": 16,
        "objective.vqkd.decoder_depth": 1,
        "objective.vqkd.decoder_heads": 2,
        "objective.vqkd.quantizer.codes": 16,
        "objective.vqkd.quantizer.width": 4,
        "objective.vqkd.quantizer.start_images": 4,
    },
    "dvae": {"objective.dvae.codes": 16, "objective.dvae.width": 8, "objective.dvae.channels": 8},
    "data2vec": {"target.average.layers": 1},
    "features": {f"{TEACHER}.source": "timm:test_vit", f"{TEACHER}.weights": "random", f"{TEACHER}.image_size": 128},
    "swin": {"swin.width": 8, "swin.depths": [1, 1], "swin.heads": [1, 2], "swin.window": 4},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Files of two small tokenizers with as many codes per image as the students have patches, by pixels per code."""
    folder, files = tmp_path_factory.mktemp("tokenizers"), {}
    for patch in (4, PATCH):
        size = SIDE // PATCH * patch
        trunk = ViT(Model(width=64, depth=1, heads=1, patch=patch, key_bias=False), size)
        files[patch] = folder / f"patch{patch}.safetensors"
        save_file(Coder(trunk, QuantizerConfig(codes=16, width=4)).state_dict(), files[patch])
    return files


def overrides(recipe, tokenizers, folder):
    config = load(Pretrain, recipe, ["data.train=unused"])
    changed = dict(SMALL) | {"run.folder": folder}
    names = {config.objective.name, config.target.name, config.trunk}
    for name in names & BESIDE.keys():
        changed |= BESIDE[name]
    if config.target.name == "codes":
        own = bool(config.target.codes.image_size)  # a tokenizer that sees the crop at a size of its own
        changed["target.codes.tokenizer"] = tokenizers[4 if own else PATCH]
        changed |= {"target.codes.image_size": SIDE // 2} if own else {}
    if config.mask.count is not None:
        changed["mask.count"] = round(config.mask.count * TOKENS / 196)
    changed |= {"mask.max_block": 16} if config.mask.max_block else {}
    return [f"{key}={value}" for key, value in changed.items()]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains(name, tokenizers, tmp_path):
    torch.manual_seed(0)
    assert train.main([name, *overrides(name, tokenizers, tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == [4, 8]
    assert all(row["loss"] is not None and row["grad_norm"] > 0 for row in rows)
    assert "nonfinite_steps" not in rows[-1]


def test_teachers_from_timm_have_the_activation_they_were_trained_with():
    """OpenAI's CLIP has QuickGELU; under the plain name timm builds it with another."""
    for name in NAMES:
        source = load(Pretrain, name, ["data.train=unused"]).target.features.teacher.source
        if source.startswith("timm:"):
            notes = timm.get_pretrained_cfg(source.removeprefix("timm:")).notes
            assert "quickgelu" in source or not any("natively QuickGELU" in note for note in notes), name
