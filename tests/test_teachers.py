"""Teachers: whole, frozen, shown the student's own view; refused early when they cannot teach this."""

import functools
import re
import socket

import pytest
import timm
import torch
from torch._dynamo.utils import counters

from halfseen import teachers
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.finetune import train
from halfseen.finetune.config import Finetune
from halfseen.pretrain import train as pretrain
from halfseen.recipes import load, to_yaml
from halfseen.teachers import Layers, TeacherConfig

HERE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def teacher(name="vit_tiny_patch16_224", size=32, **options):
    torch.manual_seed(3)
    plain = {"source": f"timm:{name}", "weights": "random", "classes": 5, "precision": "fp32"}
    cfg = TeacherConfig(**(plain | options))
    return teachers.load(cfg, student=HERE, image_size=size, device=torch.device("cpu"))


def view(size=32, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def theirs(image, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """The same pictures, normalised for a teacher."""
    brightness = image * torch.tensor(HERE[1]).view(3, 1, 1) + torch.tensor(HERE[0]).view(3, 1, 1)
    return (brightness - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "regnety_002"])
def test_a_timm_teacher_sees_the_pictures_under_its_own_normalisation(name):
    size = 224 if "swin" in name else 64
    found, image = teacher(name, size), view(size, 1)
    facts = found.module.pretrained_cfg
    with torch.no_grad():
        expected = found.module(theirs(image, facts["mean"], facts["std"]))
    torch.testing.assert_close(found.logits(image), expected, rtol=1e-3, atol=1e-4)
    features = found.features(image)
    assert features.shape == (1, *{"vit": (16, 192), "swi": (49, 768), "reg": (4, 368)}[name[:3]])
    assert "licence" in str(found)


def test_weights_out_of_reach_are_refused_before_timm_retries(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as unused:  # a port that nobody listens on
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        asked = []
        plain = timm.create_model
        monkeypatch.setattr(
            timm, "create_model", lambda *a, pretrained, **k: asked.append(pretrained) or plain(*a, **k)
        )
        with pytest.raises(ConfigError) as refused:
            teacher("test_vit.r160_in1k", 160, weights="pretrained")
        assert not asked
        assert (refused.value.key, refused.value.value) == ("teacher.source", "timm:test_vit.r160_in1k")
        assert "teacher.weights=FILE" in refused.value.fix
        cached = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / "abc" / "model.safetensors"
        cached.parent.mkdir(parents=True)
        cached.touch()
        teacher("test_vit.r160_in1k", 160, weights="pretrained")
        assert asked == [True]


def test_a_compiled_teacher_runs_compiled_and_says_the_same(run, monkeypatch):
    """Of timm, and a run of ours; by a backend that needs no C++ compiler."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    for make in (teacher, functools.partial(own, run)):
        plain = make().logits(view())
        counters.clear()
        torch.testing.assert_close(make(compile=True).logits(view()), plain)
        assert counters["stats"]["unique_graphs"] == 1


def test_answers_can_be_trained_against_and_the_teacher_cannot():
    found = teacher()
    assert not any(parameter.requires_grad for parameter in found.module.parameters())
    assert not found.module.training
    seen = found.look(view(), Layers(qkv=(0,), hidden=(1,)))
    weight = torch.ones((), requires_grad=True)
    for tensor in (seen.logits, seen.features, *seen.qkv, *seen.hidden):
        assert not tensor.is_inference()
        (weight * tensor).sum().backward()


def test_recorded_blocks_of_a_timm_vit_are_the_blocks_inputs_and_outputs():
    found, image = teacher(), view()
    seen = found.look(image, Layers(qkv=(2,), hidden=(1, 11)))
    with torch.no_grad():
        module = found.module
        block = module.blocks[2]
        torch.testing.assert_close(seen.qkv[0], block.attn.qkv(block.norm1(seen.hidden[0])))
        torch.testing.assert_close(seen.features, module.norm(seen.hidden[1])[:, 1:])
    assert seen.qkv[0].shape == (3, 1 + 4, 3 * 192)
    assert seen.prefix.shape == (3, 1, 192)
    assert not module.blocks[2].attn.qkv._forward_hooks


def test_a_smaller_micro_batch_and_another_size_of_the_view():
    found, image = teacher(), view()
    parts = teacher(micro_batch=2)
    torch.testing.assert_close(parts.logits(image), found.logits(image))
    assert teacher(size=32, image_size=48).features(image).shape[1] == 9


def test_the_options_that_save_time_change_little():
    image = view(64)
    plain = teacher("regnety_002", 64).logits(image)
    torch.testing.assert_close(
        teacher("regnety_002", 64, channels_last=True).logits(image), plain, rtol=1e-3, atol=1e-4
    )
    half = teacher("regnety_002", 64, precision="bf16").logits(image)
    assert half.dtype == torch.float32
    assert (half - plain).abs().max() < 0.05 * plain.abs().max()


def test_weights_from_a_file_must_be_whole(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    found = teacher(weights=str(tmp_path / "whole.pth"))
    assert torch.equal(found.module.head.weight, model.head.weight)
    cut = {name: value for name, value in model.state_dict().items() if name != "head.bias"}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(ConfigError, match=r"head\.bias"):
        teacher(weights=str(tmp_path / "cut.pth"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fine-tuned run of one step."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    recipe = folder.parent / "tiny.yaml"
    recipe.write_text("")
    options = [
        *("model.width=32", "model.depth=4", "model.heads=2", "model.patch=16", "model.share=2", "engine.device=cpu"),
        *("data.train=embedded:emoji/train", "data.label=folder", "data.classes=12", "data.image_size=32"),
        *("data.workers=0", "run.global_batch=16", "run.images=16", "optim.warmup=0", f"run.folder={folder}"),
    ]
    assert train.main([str(recipe), *options]) == 0
    return folder


def own(run, size=32, **options):
    cfg = TeacherConfig(source=str(run), precision="fp32", **options)
    return teachers.load(cfg, student=HERE, image_size=size, device=torch.device("cpu"))


def test_an_own_run_teaches_with_its_trunk_and_head(run):
    found, image = own(run), view()
    student = train.create_student(load(Finetune, run / "config.yaml")).eval()
    student.load_state_dict(found.module.state_dict())
    with torch.no_grad():
        predicted = student({"image": image, "task": "predict"})
    torch.testing.assert_close(found.logits(image), predicted["logits"])
    seen = found.look(image, Layers(qkv=(3,), hidden=(0, 3)))
    assert seen.qkv[0].shape == (3, 5, 96)
    assert seen.hidden[1].shape == (3, 5, 32)
    found.check(12, Layers(hidden=(3,)))
    assert to_yaml(load(Finetune, run / "config.yaml"))  # the folder's config is still a fine-tuning's


def test_a_pretraining_runs_head_is_not_taken_for_a_classifiers(tmp_path):
    folder = tmp_path / "run"
    given = {
        **{"model.width": 24, "model.depth": 1, "model.heads": 2, "model.patch": 8, "mask.cell": 16},
        **{"data.train": "embedded:emoji/train", "data.val": "null", "data.image_size": 32, "data.workers": 0},
        **{"run.images": 8, "run.global_batch": 8, "optim.warmup": 0, "run.folder": folder},
        **{"engine.name": "single", "engine.device": "cpu", "engine.precision": "fp32"},
    }
    assert pretrain.main(["pretrain/simmim_vit_b", *(f"{key}={value}" for key, value in given.items())]) == 0
    assert "head.weight" in read_weights(folder)
    found = own(folder)
    assert found.classes == 0
    assert found.features(view()).shape == (3, 16, 24)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda run: teacher().check(classes=7), ["5 classes", "7 classes"]),
        (lambda run: teacher().check(layers=Layers(qkv=(12,))), ["12 self-attention blocks", r"\[12\]"]),
        (lambda run: teacher("regnety_002", 64).check(layers=Layers(hidden=(0,))), ["no self-attention", "logits"]),
        (lambda run: teacher(compile=True).check(layers=Layers(qkv=(0,))), ["compile"]),
        (lambda run: teacher("no_such_model"), ["timm cannot make it"]),
        (lambda run: teacher(weights="nowhere.pth"), [r"teacher\.weights", "no such file"]),
        (lambda run: own(run, size=48), ["trained on 32 px"]),
        (lambda run: own(run / "nowhere"), ["no run folder"]),
        (lambda run: own(""), ["names no teacher"]),
    ],
)
def test_a_teacher_that_cannot_teach_this_is_refused(run, make, words):
    with pytest.raises(ConfigError) as refused:
        make(run)
    for word in words:
        assert re.search(word, str(refused.value)), word
