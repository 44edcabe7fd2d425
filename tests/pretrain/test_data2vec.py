"""data2vec: targets by their definition, and a teacher that is right under every engine."""

import functools

import pytest
import ranks
import torch
from torch.nn import functional as F
from toys import NAMED, furthest

from halfseen import config, engine_config, engines, optim
from halfseen.config import ConfigError, Model
from halfseen.data.hashing import uniform
from halfseen.data.masks import random_mask
from halfseen.distributed import World
from halfseen.models import ViT
from halfseen.pretrain import train
from halfseen.pretrain.data2vec import Data2Vec
from halfseen.pretrain.mim import MIMConfig
from halfseen.pretrain.targets.features import Average, AverageConfig
from halfseen.tools import reconstruct

TRUNK = Model(width=16, depth=4, heads=2, patch=8, position="learned", layer_scale=0.5, drop_path=0.2)
TOTAL, STEPS = 8, 4
ENGINES = ["ddp", "fsdp", "zero1", "zero3"]


def student(layers=3, drop_path=0.2, **options):
    torch.manual_seed(0)
    trunk = ViT(Model(**(vars(TRUNK) | {"drop_path": drop_path})), 32)
    target = Average(AverageConfig(layers=layers, **options), 4, 16, 8)
    made = Data2Vec(trunk, MIMConfig(start="trunk"), 8, target)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def batch_at(positions):
    image = uniform(3, positions, 3 * 32 * 32, "image").view(-1, 3, 32, 32) * 2 - 1
    return {"image": image, "mask": random_mask(0, positions, 16, 8), "position": positions}


def make(world, name="auto", **options):
    made = student(drop_path=0.0)  # drop path draws from the rank, so it would tell one rank from two
    chosen = config.Optim(clip=0.5, eps=1e-4)
    given = {"ema": 0.9, "ema_start": 0.5, "ema_ramp": str(3 * TOTAL)} | NAMED.get(name, {"name": name}) | options
    return engines.create(engine_config.Engine(**given), made, chosen, optim.groups(made, chosen), world, 0)


def steps(engine, world, count=STEPS, start=0):
    history = []
    for position in range(start, start + count * TOTAL, TOTAL):
        own = torch.arange(position + world.rank, position + TOTAL, world.world)
        halves = [batch_at(part) for part in own.chunk(2)]
        history.append({name: float(v) for name, v in engine.step(halves, 0.05, position).items()})
    return history


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_the_target_is_the_mean_of_the_last_blocks_whitened_as_asked(each, after):
    made = student(whiten_each=each, whiten=after).eval()
    batch = batch_at(torch.arange(3))
    taught = made(batch | {"task": "teach"})["target"]
    x, layers = made.encoder.embed(batch["image"]), []
    for block in made.encoder.blocks:
        x = block(x)
        layers.append(x[:, 1:])
    chosen = [F.layer_norm(layer, (16,)) if each else layer for layer in layers[1:]]
    expected = torch.stack(chosen).mean(0)
    torch.testing.assert_close(taught, F.layer_norm(expected, (16,)) if after else expected)


def test_the_loss_is_smooth_l1_at_hidden_patches():
    made = student(drop_path=0.0)
    batch = batch_at(torch.arange(3))
    batch |= made.eval()(batch | {"task": "teach"})
    prediction = made(batch | {"task": "predict"})["prediction"]
    expected = F.smooth_l1_loss(prediction[batch["mask"]], batch["target"][batch["mask"]], beta=2.0)
    torch.testing.assert_close(made(batch)["loss"], expected)


def by_hand(count=STEPS):
    """The method written out: an average beside the student, its decay ramping from 0.5 to 0.9 over three steps."""
    made, teacher = student(drop_path=0.0), student(drop_path=0.0).eval()
    chosen = config.Optim(clip=0.5, eps=1e-4)
    named = dict(made.named_parameters())
    optimizer = optim.build(chosen, optim.groups(made, chosen), named)
    losses = []
    for step in range(count):
        optim.set_rate(optimizer, 0.05)
        halves = [batch_at(part) for part in torch.arange(step * TOTAL, (step + 1) * TOTAL).chunk(2)]
        with torch.no_grad():
            answers = [teacher(half | {"task": "teach"}) for half in halves]
        values = [made(half | answer)["loss"] for half, answer in zip(halves, answers)]
        loss = sum(values) / 2
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(made.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        decay = 0.5 + 0.4 * min(step / 3, 1)
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), made.parameters()):
                average.mul_(decay).add_((1 - decay) * weight)
    return losses


def test_the_engine_does_what_the_method_says():
    engine = make(World())
    assert engine.hyperparameters()["ema_decay"] == 0.5
    losses = [step["loss"] for step in steps(engine, World())]
    assert losses == pytest.approx(by_hand(), rel=1e-5)
    assert engine.hyperparameters()["ema_decay"] == 0.9


def curves(world, names):
    return {name: steps(make(world, name), world) for name in names}


@functools.cache
def on_two_ranks():
    return ranks.run(curves, 2, ENGINES)[0]


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_give_the_curve_of_one_under_every_engine(name):
    torch.set_num_threads(1)
    assert furthest(steps(make(World()), World()), on_two_ranks()[name], "loss", "grad_norm", "cosine") < 1e-5


def test_a_resumed_run_goes_on_to_the_bit():
    whole = steps(make(World()), World())
    first, second = make(World()), make(World())
    steps(first, World(), 2)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    assert steps(second, World(), 2, start=2 * TOTAL) == whole[2:]


def test_other_students_get_their_batches_back():
    engine = make(World())
    engine.student.learns_from_average = False
    batches = [batch_at(torch.arange(2))]
    assert engine.taught(batches) is batches


def test_a_picture_of_a_finished_run_asks_its_average(tmp_path):
    small = ["model.width=32", "model.depth=2", "model.heads=2", "data.image_size=64", "mask.count=8"]
    run = ["run.images=8", "run.global_batch=4", "run.checkpoint_every=8", "optim.warmup=0"]
    data = ["data.train=embedded:emoji/train", "data.val=null", "data.limit=8", "data.workers=0", "engine.name=single"]
    folder, average = tmp_path / "run", ["target.average.layers=2", "mask.min_block=2", "mask.max_block=8"]
    assert train.main(["pretrain/data2vec_b", *small, *run, *data, *average, f"run.folder={folder}"]) == 0
    assert reconstruct.main([str(folder), "--out", str(tmp_path / "drawn.png"), "--count", "2"]) == 0
    assert (tmp_path / "drawn.png").is_file()


def test_more_layers_than_the_student_has_are_refused():
    with pytest.raises(ConfigError, match="has 4 blocks"):
        Average(AverageConfig(layers=5), 4, 16, 8)
