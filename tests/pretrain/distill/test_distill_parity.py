"""A multiplexed student that learns scores, relations and hidden patches: one curve under every engine, on 2 ranks."""

import functools
from pathlib import Path

import pytest
import ranks
import torch
from toys import NAMED, furthest

from halfseen.distributed import World
from halfseen.pretrain.distill import train
from halfseen.pretrain.distill.config import Distill
from halfseen.recipes import load

STEPS = 4
OPTIONS = [
    *("model.width=32", "model.depth=4", "model.heads=2", "model.patch=16", "model.groups=[1,2,1]"),
    "model.drop_path=0",
    *("model.head_mixing=linear", "model.irpe=product", "model.class_token=false", "model.distillation_token=false"),
    *("task.pool=norm_mean", "engine.device=cpu", "engine.ema=0.9", "optim.clip=1", "optim.eps=1e-4"),
    *("data.train=embedded:emoji/train", "data.label=folder", "data.classes=12", "data.image_size=32"),
    *("data.workers=0", "data.repeats=1", "run.global_batch=16", "run.images=64", "run.micro_batch=4"),
    *("optim.warmup=0", "optim.base_lr=null", "optim.lr=1e-3", "task.mix_stride=2"),
    *("teacher.source=timm:test_vit", "teacher.weights=random", "teacher.classes=12"),
    *("teacher.precision=fp32", "distillation.scores=soft_ce", "distillation.share=1", "distillation.attention=10"),
    *("distillation.hidden=0.1", "distillation.hidden_form=match"),
    *("distillation.student_layers=[1,2]", "distillation.teacher_layers=[2,5]"),
    *("mim.weight=0.5", "mim.form=mae", "mim.mask.ratio=0.5", "mim.mae.decoder_width=16", "mim.mae.decoder_depth=2"),
    "mim.mae.decoder_heads=2",
]
ENGINES = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "oss", "sharded"]


def curve(world, name, **options):
    """Scalars of each step, and the weights afterwards; of the third also the gradient norm of each term."""
    chosen = NAMED.get(name, {"name": name}) | options
    engine = [f"engine.{option}={str(value).lower() if isinstance(value, bool) else value}"
              for option, value in chosen.items()]  # fmt: skip
    config = load(Distill, None, [*OPTIONS, *engine])
    made = train.parts(config, world, Path())
    running = made.engine(config, world, fresh=True)
    stream, history = made.stream(0), []
    for position in range(0, STEPS * 16, 16):
        batches = [made.prepare(next(stream)) for _ in range(made.batches.accumulation)]
        norms = {}
        if position == 32:
            eight = batches[0] if world.world == 2 else joined(*batches[:2])  # images of the same positions
            norms = {f"{term}, gradient": norm for term, norm in running.norms(eight, made.student.terms).items()}
        scalars = running.step(batches, made.schedule(config).rate(position), position)
        history.append({key: float(value) for key, value in (scalars | norms).items()})
    return history, running.weights(), running.weights(ema=True)


def joined(one, other):
    """Two prepared micro-batches as one."""
    if isinstance(one, dict):
        return {name: joined(one[name], other[name]) for name in one}
    if isinstance(one, list):
        return [joined(*pair) for pair in zip(one, other)]
    return torch.cat([one, other]) if one.ndim else one


@functools.cache
def reference():
    torch.set_num_threads(1)
    return curve(World(), "single")


@pytest.mark.parametrize("name", ENGINES)
def test_a_multiplexed_distilled_student_has_one_curve(name):
    expected, weights, averages = reference()
    history, ours, our_averages = ranks.run(curve, 2, name)[0]
    terms = [term for term in expected[0] if term.startswith("loss")]
    assert len(terms) == 5
    assert furthest(expected, history, *terms, "grad_norm") < 2e-6
    apart = [term for term in expected[2] if term.endswith("gradient")]
    assert len(apart) == 4
    assert furthest(expected[2:3], history[2:3], *apart) < 1e-5
    for key, value in (weights | averages).items():
        torch.testing.assert_close((ours | our_averages)[key], value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("options", [{"recompute": True}, {"compile": True}, {"recompute": True, "compile": True}])
def test_recomputing_activations_and_compiling_blocks_change_nothing(options, monkeypatch):
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiler(module, backend="aot_eager"))
    expected, weights, _ = reference()
    history, ours, _ = curve(World(), "single", **options)
    assert furthest(expected, history, "loss", "grad_norm") < 1e-6
    assert all(torch.allclose(ours[key], value, rtol=1e-5, atol=1e-7) for key, value in weights.items())


def test_the_student_learns():
    history = reference()[0]
    assert history[-1]["loss_hidden"] < history[0]["loss_hidden"]
