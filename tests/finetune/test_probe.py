"""Probes: the trunk never moves, heads do not touch each other, and a run of either kind can be probed and resumed."""

import json
import math
import random

import pytest
import ranks
import torch
from torch.nn import functional as F

from halfseen import engines
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError, Model, Optim
from halfseen.distributed import World
from halfseen.engine_config import Engine
from halfseen.finetune import probe
from halfseen.finetune.probe_config import Heads, Probe
from halfseen.models import ViT
from halfseen.pretrain.train import main as pretrain
from halfseen.recipes import load

SMALL = {"size": "ti", "width": 32, "depth": 2, "heads": 2, "patch": 16}
LABELS = ["data.label=folder", "data.classes=12", "data.val=embedded:emoji/val"]
SHORT = ["run.images=96", "run.global_batch=32", "optim.warmup=32", "run.evaluate_every=48", "run.checkpoint_every=48"]


def make(rates=(1.0,), kind="linear", **more):
    torch.manual_seed(0)
    return probe.Probed(ViT(Model(**SMALL), 32), Heads(kind=kind, rates=list(rates), heads=4, **more), 5)


def batch(count=8):
    rng = torch.Generator().manual_seed(1)
    return {"image": torch.randn(count, 3, 32, 32, generator=rng), "target": torch.arange(count) % 5}


def train(student, cfg, steps=4):
    groups = student.groups(cfg)
    engine = engines.create(Engine(), student, cfg, groups, World(), 0)
    return [engine.step([batch()], 0.3, 8 * number) for number in range(steps)], engine


def probed(world):
    """Losses, heads and statistics after some steps; each rank has every other image of one batch."""
    student, cfg = make(), Optim(name="lars", lr=0.3, base_lr=None)
    engine = engines.create(Engine(device="cpu"), student, cfg, student.groups(cfg), world, 0)
    own = {name: value[world.rank :: world.world] for name, value in batch().items()}
    losses = [world.sum(engine.step([own], 0.3, 8 * step)["loss"].double()) / world.world for step in range(4)]
    return losses, engine.weights(), student.state_dict()["norm.running_var"].clone()


def test_several_cpu_ranks_probe_as_one_does():
    (losses, weights, variance), found = probed(World()), ranks.run(probed, 2)
    torch.testing.assert_close(found[0][0], losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1]["heads.0.weight"], weights["heads.0.weight"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1][2], variance, rtol=1e-4, atol=1e-6)


def test_defaults_are_maes_linear_probe():
    config = load(Probe, None, ["data.label=cls", "data.classes=1000"])
    assert (config.optim.name, config.optim.base_lr, config.optim.weight_decay) == ("lars", 0.1, 0.0)
    assert (config.run.images, config.run.global_batch, config.optim.warmup) == ("90ep", 16384, "10ep")
    assert (config.probe.pool, config.probe.std, config.augment.crop_scale) == ("class", 0.01, (0.08, 1.0))
    student = make()
    assert not student.norm.affine
    assert student.norm.eps == 1e-6


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_only_heads_train_and_the_trunk_keeps_its_bits(kind):
    student = make(kind=kind)
    before = {name: value.clone() for name, value in student.encoder.state_dict().items()}
    scalars, engine = train(student, Optim(lr=0.1, base_lr=None))
    assert float(scalars[-1]["loss"]) < float(scalars[0]["loss"])
    assert all(torch.equal(before[name], value) for name, value in student.encoder.state_dict().items())
    assert all(name.startswith("heads.") for name in engine.trained)
    assert not student.encoder.training


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_heads_at_several_rates_are_those_of_runs_of_their_own(name):
    cfg = Optim(name=name, lr=0.1, base_lr=None, weight_decay=0.01)
    together = make([0.1, 3.0])
    together.heads[1].load_state_dict(together.heads[0].state_dict())
    start = {key: value.clone() for key, value in together.heads[0].state_dict().items()}
    train(together, cfg)
    for number, rate in enumerate((0.1, 3.0)):
        alone = make([rate])
        alone.heads[0].load_state_dict(start)
        train(alone, cfg)
        for key, value in alone.heads[0].state_dict().items():
            torch.testing.assert_close(together.heads[number].state_dict()[key], value)
    assert not torch.equal(together.heads[0].weight, together.heads[1].weight)


def test_an_attentive_head_is_softmax_over_tokens():
    head, tokens = make(kind="attentive").heads[0], torch.randn(2, 5, 32)
    key, value = F.linear(tokens, head.kv.weight).split(32, dim=-1)
    gathered = []
    for part in range(4):
        own = slice(8 * part, 8 * part + 8)
        share = (key[..., own] @ head.query[0, own] / math.sqrt(8)).softmax(-1)
        gathered.append((share[..., None] * value[..., own]).sum(1))
    torch.testing.assert_close(head(tokens), F.linear(torch.cat(gathered, -1), head.head.weight, head.head.bias))


def test_the_crop_draws_once_and_is_cut_to_the_image():
    """A wide crop of a narrow image is not drawn again, as it is in the usual crop."""
    crop = probe.Crop((1.0, 1.0), (2.0, 2.0), 0.0, 8)
    image = torch.arange(40 * 10, dtype=torch.uint8).view(1, 40, 10).expand(3, -1, -1)
    seen = {crop(image, random.Random(seed)).sum().item() for seed in range(20)}
    assert len(seen) > 5, "the height of sqrt(400/2) = 14 stands anywhere among 40"
    assert crop(image, random.Random(0)).shape == (3, 8, 8)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A short pretraining run over the embedded images."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    model = [f"model.{name}={value}" for name, value in SMALL.items()]
    small = ["objective.mae.decoder_width=16", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2"]
    rest = ["run.images=64", "run.global_batch=32", "optim.warmup=0", "run.checkpoint_every=64", "engine.device=cpu"]
    data = ["data.train=embedded:emoji/train", "data.image_size=32", "data.workers=0", "data.label=none"]
    (folder.parent / "recipe.yaml").write_text("")
    recipe = str(folder.parent / "recipe.yaml")
    assert pretrain([recipe, *model, *small, *rest, *data, "monitor.tensorboard=false", f"run.folder={folder}"]) == 0
    return folder


def test_a_pretraining_run_can_be_probed_and_the_probe_resumed(pretrained, tmp_path, capsys):
    options = [*LABELS, *SHORT, "probe.rates=[0.3,3]", f"run.folder={tmp_path / 'probe'}", "monitor.tensorboard=false"]
    assert probe.main(["linear", str(pretrained), *options]) == 0
    assert "rate, top-1" in capsys.readouterr().out
    found = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert found["position"] == 96
    assert (
        found["val/top1"]
        == max(found["val/top1_0.3"], found["val/top1_3"])
        == found[f"val/top1_{found['best_rate']:g}"]
    )
    weights, source = read_weights(tmp_path / "probe"), read_weights(pretrained)
    assert torch.equal(weights["encoder.blocks.1.mlp.fc1.weight"], source["encoder.blocks.1.mlp.fc1.weight"])
    assert probe.main(["linear", str(pretrained), *options]) == 0
    assert "complete" in capsys.readouterr().out


def test_neighbours_of_a_pretraining_run(pretrained, tmp_path):
    out = tmp_path / "knn.json"
    assert probe.main(["knn", str(pretrained), *LABELS, "--k", "1,10", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found) == ["1", "10"]
    assert all(1 / 12 < share < 1 for share in found.values()), "better than chance on images of 12 classes"


def test_a_probe_without_labels_or_weights_is_refused(pretrained, tmp_path):
    with pytest.raises(ConfigError, match="a probe needs at least two"):
        probe.main(["linear", str(pretrained)])
    with pytest.raises(ConfigError, match="no such file or folder"):
        probe.main(["knn", str(tmp_path / "nothing.pth"), *LABELS])
    with pytest.raises(ConfigError, match="list of different numbers"):
        probe.main(["linear", str(pretrained), *LABELS, "probe.rates=[1,1]"])
