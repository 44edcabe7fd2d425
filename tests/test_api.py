"""The Python API: one call to a backbone, whatever wrote the weights; features are those of the student itself."""

import pydoc
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import halfseen
from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError, Model
from halfseen.finetune.train import main as finetune
from halfseen.models import ViT
from halfseen.pretrain.train import main as pretrain
from halfseen.tools.delta import main as make_delta
from halfseen.tools.export import main as export

MODEL = ["model.width=32", "model.depth=2", "model.heads=2", "model.patch=16", "engine.device=cpu"]
DATA = ["data.train=embedded:emoji/train", "data.image_size=32", "data.workers=0", "monitor.tensorboard=false"]
SHORT = ["run.images=32", "run.global_batch=16", "optim.warmup=0", "run.checkpoint_every=32"]
MAE = ["objective.mae.decoder_width=16", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining run, and a fine-tuning run of it with averages."""
    folder = tmp_path_factory.mktemp("api")
    recipe = folder / "recipe.yaml"
    recipe.write_text("")
    common = [*MODEL, *DATA, *SHORT]
    assert pretrain([str(recipe), *common, *MAE, f"run.folder={folder / 'pre'}"]) == 0
    labels = ["data.label=folder", "data.classes=12", "augment.randaugment=", "augment.mixup=0", "augment.cutmix=0"]
    start = [f"run.init={folder / 'pre'}", f"run.folder={folder / 'fine'}", "engine.ema=0.5"]
    assert finetune([str(recipe), *common, *labels, *start]) == 0
    return folder


def pictures(count=3, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_a_pretraining_run_is_a_backbone_without_a_head(runs):
    model = halfseen.load(runs / "pre")
    assert isinstance(model, halfseen.Backbone)
    assert not model.training
    assert (model.num_features, model.num_classes) == (32, 0)
    tokens = model.encoder(pictures())
    assert torch.equal(model.forward_features(pictures()), tokens)
    assert torch.equal(model.features(pictures()), tokens[:, 1:].mean(1))
    assert torch.equal(model.features(pictures(), "class"), tokens[:, 0])
    assert torch.equal(model(pictures()), model.features(pictures()))
    with pytest.raises(ValueError, match="no head"):
        model.features(pictures(), "head")


def test_a_fine_tuned_run_scores_and_its_averages_score_otherwise(runs):
    model, averaged = halfseen.load(runs / "fine"), halfseen.load(str(runs / "fine"), part="ema")
    assert model(pictures()).shape == (3, 12)
    assert not torch.equal(model(pictures()), averaged(pictures()))
    whole = model.classifier({"image": pictures(), "task": "predict"})
    assert torch.equal(model.features(pictures()), whole["features"])
    checkpoint = next((runs / "fine" / "checkpoints").glob("img_*"))
    assert torch.equal(halfseen.load(checkpoint)(pictures()), model(pictures()))


def test_a_neck_of_timms_kind_can_be_built_on_it(runs):
    """What segmentation and detection necks ask a timm backbone: channels and strides of maps, and the maps."""
    model = halfseen.load(runs / "fine")
    maps = model.forward_intermediates(pictures(), [0, 1])
    for info, found in zip(model.feature_info, maps):
        assert found.shape == (3, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
        assert dict(model.named_modules())[info["module"]] is not None
    tokens = model.forward_features(pictures())
    assert torch.equal(model.forward_head(tokens), model(pictures()))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), model.features(pictures()))
    model.train()
    loss = torch.nn.Linear(model.num_features, 2)(model.features(pictures())).sum()
    loss.backward()
    assert model.encoder.blocks[0].mlp.fc1.weight.grad is not None


def test_one_base_and_a_delta_for_each_task(runs, tmp_path):
    change, whole = tmp_path / "task.safetensors", tmp_path / "whole.safetensors"
    assert make_delta(["make", str(runs / "pre"), str(runs / "fine"), str(change)]) == 0
    expected = halfseen.load(runs / "fine")(pictures())
    assert torch.equal(halfseen.load(runs / "pre", change=change)(pictures()), expected)
    assert make_delta(["apply", str(runs / "pre"), str(change), str(whole)]) == 0
    assert torch.equal(halfseen.load(whole)(pictures()), expected), "the file says itself what it is"
    with pytest.raises(ConfigError, match="is a delta"):
        halfseen.load(change)


def test_help_names_the_api():
    shown = pydoc.render_doc(halfseen, renderer=pydoc.plaintext)
    for name in ("load(source", "class Backbone", "transforms_for(model"):
        assert name in shown


def test_an_exported_file_says_itself_what_it_is(runs, tmp_path):
    for part in ("encoder", "student"):
        assert export([str(runs / "pre"), str(tmp_path / f"{part}.safetensors"), "--part", part]) == 0
        model = halfseen.load(tmp_path / f"{part}.safetensors")
        assert torch.equal(model.features(pictures()), halfseen.load(runs / "pre").features(pictures()))


def test_any_other_file_needs_a_recipe(runs, tmp_path):
    student = Classifier(ViT(Model(width=32, depth=2, heads=2, patch=16), 32), Task(), 12)
    theirs = {name.removeprefix("encoder."): value for name, value in student.state_dict().items()}
    save_file(theirs, tmp_path / "timm.safetensors")
    with pytest.raises(ConfigError, match="does not say what its trunk is"):
        halfseen.load(tmp_path / "timm.safetensors")
    model = halfseen.load(tmp_path / "timm.safetensors", recipe=runs / "fine" / "config.yaml")
    expected = student.eval()({"image": pictures(), "task": "predict"})["logits"]
    torch.testing.assert_close(model(pictures()), expected)


def test_a_recipe_is_its_model_with_random_weights():
    model = halfseen.load("finetune/demo")
    assert model.num_classes == 12
    assert model(pictures(1, 48)).shape == (1, 12)


def test_another_size_need_not_be_square(runs):
    model = halfseen.load(runs / "fine", image_size=(32, 64))
    assert model.image_size == (32, 64)
    images = torch.randn(2, 3, 32, 64)
    first, last = model.forward_intermediates(images, [0, -1])
    with pytest.raises(ValueError, match=r"no blocks \[2\], only 0 to 1"):
        model.forward_intermediates(images, [2])
    assert first.shape == last.shape == (2, 32, 2, 4)
    tokens = model.encoder.trace(images, layers=[1]).layers[1][:, 1:]
    assert torch.equal(last[1, :, 1, 2], tokens[1, 4 + 2])


def test_every_kind_of_picture_becomes_what_the_model_was_trained_on(runs, tmp_path):
    model = halfseen.load(runs / "fine")
    see = halfseen.transforms_for(model)
    array = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    seen = [see(kind) for kind in (*kinds, Image.fromarray(array), array, tensor)]
    assert seen[0].shape == (3, 32, 32)
    assert seen[0].dtype == torch.float32
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    assert abs(seen[0].mean()) < 1.5
    with pytest.raises(ValueError, match="a picture is uint8"):
        see(tensor.float())


def test_importing_halfseen_loads_nothing_heavy():
    code = "import sys, halfseen; assert 'torch' not in sys.modules; halfseen.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = halfseen.lode


def test_a_picture_is_the_same_from_a_file_and_from_pillow(tmp_path):
    see = halfseen.transforms_for(halfseen.load("pretrain/demo"))
    drawing = Image.new("RGBA", (90, 60), (0, 0, 0, 0))  # transparent, which is laid on white
    drawing.paste((200, 30, 30, 255), (0, 0, 40, 30))
    turned = Image.new("RGB", (90, 60), (10, 20, 30))
    turned.paste((250, 0, 0), (0, 0, 45, 60))
    tag = turned.getexif()
    tag[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=tag)
    drawing.save(tmp_path / "alpha.png")
    Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "sixteen.png")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as picture:
            assert torch.equal(see(picture), see(path)), path.name
    backwards = np.asarray(drawing.convert("RGB"))[:, :, ::-1]  # BGR made RGB is a view with negative strides
    assert see(backwards).shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"hello", "these bytes: not an image"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[3, H, W\], not torch.uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3)), "not torch.float64"),
    ],
)
def test_what_is_no_picture_is_a_value_error_that_says_so(picture, message, tmp_path):
    see = halfseen.transforms_for(halfseen.load("pretrain/demo"))
    with pytest.raises(ValueError, match=message):
        see(picture)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.jpg: not an image"):
        see(tmp_path / "text.jpg")


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 40, 48), torch.zeros(3, 48, 48), torch.zeros(1, 3, 48, 48, dtype=torch.uint8)]
)
def test_images_that_do_not_fit_are_refused_with_what_does(images):
    model = halfseen.load("pretrain/demo")
    for call in (model, lambda given: model.forward_intermediates(given, [0])):
        with pytest.raises(ValueError, match=r"images are float \[B, 3, 48, 48\] .*image_size="):
            call(images)


def test_a_source_that_is_nothing_is_refused_as_such():
    with pytest.raises(
        ConfigError, match=r"source='pretrain/dem': is no run, weight file or recipe\n  fix: try pretrain/demo"
    ):
        halfseen.load("pretrain/dem")
