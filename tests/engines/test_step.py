"""What one step promises: wrong numbers stay out, randomness has a source, the host is not asked."""

import contextlib
import functools

import pytest
import ranks
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TOTAL, Student, furthest, layer_of, make, steps, stream

from halfseen import config, engine_config, engines, optim
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.engines import recompute
from halfseen.engines.parts import local_part


def snapshot(engine):
    return {key: local_part(value).clone() for key, value in engine.state().items()}


def changed(engine, before):
    after = snapshot(engine)
    return [key for key in before if not torch.equal(before[key], after[key])]


# ------------------------------------------------------------------------------------------ the numbers


def plain_steps(count, clip):
    """The toy's training as a script would write it: whole batches, torch's optimizer and clipping."""
    torch.manual_seed(1)
    student, history = Student(), []
    groups = optim.groups(student, config.Optim(layer_decay=0.7), layer_of, 4)
    named = dict(student.named_parameters())
    listed = [
        {"params": [named[name] for name in group.names], "lr": 0.01 * group.lr_scale, "weight_decay": weight_decay}
        for group, weight_decay in ((group, group.weight_decay) for group in groups)
    ]
    optimizer = torch.optim.AdamW(listed, betas=(0.9, 0.95), eps=1e-4)
    data = stream(Batches(TOTAL, 1, TOTAL, 1), 0)
    for _ in range(count):
        loss = student(next(data))["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
    return history, student.state_dict()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_reference_of_all_engines_is_plain_torch(clip, accumulation):
    """Clipping in some of the steps: AdamW hardly sees a factor that all have."""
    expected, weights = plain_steps(6, clip)
    assert min(step["grad_norm"] for step in expected) < 1.0 < max(step["grad_norm"] for step in expected)
    engine = make(World(), optimizer={"clip": clip})
    assert furthest(expected, steps(engine, World(), 6, accumulation=accumulation), "loss", "grad_norm") < 1e-5
    for name, weight in engine.weights().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)


OPTIMIZERS = ("adamw", "lamb", "lars", "sgd")


def skip(world, name):
    """For each optimizer three good steps, one with a NaN in one sample of the last rank, and what it left behind."""
    return {optimizer: skip_one(world, name, optimizer) for optimizer in OPTIMIZERS}


def skip_one(world, name, optimizer):
    engine = make(world, name, ema=0.5, optimizer={"name": optimizer})
    steps(engine, world, 3)
    before = snapshot(engine)
    bad = steps(engine, world, 1, start=3 * TOTAL, poison=(3 * TOTAL + world.world - 1,))[0]
    left = changed(engine, before)
    count, first = engine.skipped(), engine.first_skipped
    gradients = [name for name, p in engine.parameters.items() if p.grad is not None]
    after = steps(engine, world, 1, start=4 * TOTAL)[0]
    return bad, left, count, first, gradients, after, engine.skipped(), changed(engine, before)


@functools.cache
def skipped_by(name, world):
    return ranks.run(skip, world, name) if world > 1 else [skip(World(), name)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_nan_on_one_rank_changes_nothing_on_any(name, world, optimizer):
    results = [rank[optimizer] for rank in skipped_by(name, world)]
    for bad, left, count, first, gradients, after, later, moved in results:
        assert bad["loss"] != bad["loss"]
        assert left == []
        assert (count, first, later) == (1, 3 * TOTAL, 0)
        assert gradients == []
        assert after["loss"] == results[0][5]["loss"] < 1
        assert any(key.startswith("model.") for key in moved)
        assert any(key.startswith("ema.") for key in moved)


class Explosive(Student):
    """A finite loss whose gradient is not."""

    def forward(self, batch):
        scalars = super().forward(batch)
        zero = (self.head.weight - self.head.weight.detach()).square().sum()
        return scalars | {"loss": scalars["loss"] + zero.sqrt()}  # 0, with gradient 0 / 0


def test_a_finite_loss_with_a_wrong_gradient_is_skipped_too():
    torch.manual_seed(0)
    student = Explosive()
    chosen = config.Optim(clip=1.0)
    engine = engines.create(engine_config.Engine(), student, chosen, optim.groups(student, chosen), World(), 0)
    before = snapshot(engine)
    scalars = steps(engine, World(), 1)[0]
    assert scalars["loss"] == scalars["loss"]
    assert scalars["grad_norm"] != scalars["grad_norm"]
    assert changed(engine, before) == []
    assert engine.skipped() == 1


def test_batch_norm_statistics_stay_clean():
    engine = make(World(), student={"batch_norm": True})
    steps(engine, World(), 2)
    before = snapshot(engine)
    assert "buffer.statistics.running_mean" in before
    steps(engine, World(), 1, start=2 * TOTAL, poison=(2 * TOTAL,))
    assert changed(engine, before) == []
    steps(engine, World(), 1, start=3 * TOTAL)
    assert "buffer.statistics.running_mean" in changed(engine, before)


def test_fp16_finds_its_scale_without_spending_the_skip_budget():
    engine = make(World(), precision="fp16")
    engine.scale.fill_(2.0**40)  # far too large: every gradient overflows at first
    before = snapshot(engine)
    first = steps(engine, World(), 1)[0]
    assert first["loss"] < 1
    assert [key for key in changed(engine, before) if not key.startswith("scaler.")] == []
    assert float(engine.scale) == 2.0**39
    history = steps(engine, World(), 40, start=TOTAL)
    assert engine.skipped() == 0
    assert float(engine.scale) < 2.0**30
    assert history[-1]["loss"] < 0.7 * first["loss"]
    steps(engine, World(), 1, start=0, poison=(0,))
    assert engine.skipped() == 1


def test_fp16_tries_a_larger_scale_after_two_thousand_good_updates():
    engine = make(World(), precision="fp16")
    engine.scale.fill_(2.0**10)
    engine.growth.fill_(1998)
    steps(engine, World(), 1)
    assert (float(engine.scale), int(engine.growth)) == (2.0**10, 1999)
    steps(engine, World(), 1, start=TOTAL)
    assert (float(engine.scale), int(engine.growth)) == (2.0**11, 0)


def test_the_first_of_several_skipped_updates_is_named():
    engine = make(World())
    steps(engine, World(), 5, poison=(TOTAL, 3 * TOTAL))
    assert (engine.skipped(), engine.first_skipped) == (2, TOTAL)
    steps(engine, World(), 1, start=5 * TOTAL)
    assert (engine.skipped(), engine.first_skipped) == (0, None)


def test_dropout_is_a_function_of_seed_position_and_rank():
    def run(seed=5, noise=0, rank=0):
        engine = make(World(rank=rank), student={"dropout": 0.5}, seed=seed)
        torch.manual_seed(noise)  # what happened elsewhere in the process has no influence
        return steps(engine, World(), 3)

    assert run() == run(noise=99)
    assert run() != run(seed=6)
    assert run() != run(rank=1)


def test_recomputing_replays_dropout():
    with_dropout = {"dropout": 0.5}
    kept = steps(make(World(), student=with_dropout), World(), 5)
    assert steps(make(World(), student=with_dropout, recompute=True), World(), 5) == kept
    waiting = make(World(), student=with_dropout, recompute=True, offload_activations=True)
    assert steps(waiting, World(), 5) == kept


def test_what_waits_on_the_host_is_what_the_backward_starts_from(monkeypatch):
    """A wrong copy gives wrong gradients: nothing else was kept."""
    norms = []
    for scale in (1.0, 2.0):
        monkeypatch.setattr(recompute, "on_host", lambda x, scale=scale: x * scale)
        engine = make(World(), recompute=True, offload_activations=True)
        norms.append(steps(engine, World(), 1)[0]["grad_norm"])
    assert norms[0] == steps(make(World()), World(), 1)[0]["grad_norm"]
    assert abs(norms[1] - norms[0]) / norms[0] > 1e-3


class Questions(TorchDispatchMode):
    """Collects operators that bring a tensor's value to the host."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.asked.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_asks_for_a_number_on_the_host(optimizer, precision):
    engine = make(World(), ema=0.9, precision=precision, optimizer={"name": optimizer})
    data = stream(Batches(TOTAL, 1, 6, 2), 0)
    batches = [next(data), next(data)]
    with Questions() as questions:
        engine.step(batches, 0.01, 0)
    assert questions.asked == []
    with Questions() as questions:
        engine.skipped()
        engine.scale.item()
    assert questions.asked  # the probe works


def test_rates_follow_groups_and_the_schedule():
    engine = make(World(), optimizer={"layer_decay": 0.5})
    data = stream(Batches(TOTAL, 1, TOTAL, 1), 0)
    engine.step([next(data)], 0.04, 0)
    rates = {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
    assert rates["layer_4.decay"] == 0.04
    assert rates["layer_0.decay"] == 0.04 * 0.5**4
    assert engine.hyperparameters() == {"lr": 0.04, "weight_decay": 0.05}


def test_changing_what_trains_is_refused():
    engine = make(World(), student={"frozen": True})
    engine.parameters["embed.weight"].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"embed\.weight changed"):
        steps(engine, World(), 1)


def test_groups_must_cover_exactly_what_trains():
    student = Student()
    groups = optim.groups(student, config.Optim())
    student.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"head\.bias"):
        engines.create(engine_config.Engine(), student, config.Optim(), groups, World(), 0)


def averages(world, name):
    engine = make(world, name, ema=0.75)
    steps(engine, world, 3)
    plain, mean = engine.weights(), engine.weights(ema=True)
    with engine.averaged():
        inside = engine.weights()
        with pytest.raises(RuntimeError, match="averaged"):
            engine.state()
    return plain, mean, inside, engine.weights()


@pytest.mark.parametrize(("name", "world"), [("single", 1), ("fsdp", 2)])
def test_averaged_swaps_and_swaps_back(name, world):
    plain, mean, inside, after = (ranks.run(averages, world, name) if world > 1 else [averages(World(), name)])[0]
    for key, value in plain.items():
        assert torch.equal(after[key], value), key
        assert torch.equal(inside[key], mean[key]), key
    assert not torch.equal(plain["head.weight"], mean["head.weight"])


def test_the_average_is_the_formula():
    engine = make(World(), ema=0.75)
    mean = engine.weights()
    for step in range(3):
        steps(engine, World(), 1, start=step * TOTAL)
        mean = {name: 0.75 * old + 0.25 * engine.weights()[name] for name, old in mean.items()}
    for name, value in engine.weights(ema=True).items():
        torch.testing.assert_close(value, mean[name])


def predictions(world, name):
    engine = make(world, name, student={"dropout": 0.5}, recompute=True)
    batch = next(stream(Batches(TOTAL, 1, TOTAL, 1), 0))
    once, again = engine.predict(batch)["logits"], engine.predict(batch)["logits"]
    assert torch.equal(once, again)  # no dropout
    assert not once.requires_grad
    assert engine.module.training
    return once, steps(engine, world, 2)


def test_predicting_is_the_same_under_every_engine():
    expected, history = predictions(World(), "single")
    assert expected.shape == (TOTAL, 4)
    for name in ("ddp", "fsdp"):
        for logits, _ in ranks.run(predictions, 2, name):
            torch.testing.assert_close(logits, expected)
    assert history == steps(make(World(), student={"dropout": 0.5}), World(), 2)  # predicting left no trace


def test_ddp_ranks_may_predict_different_numbers_of_batches():
    assert ranks.run(uneven, 2) == [1, 3]


def uneven(world):
    engine = make(world, "ddp", student={"tied": False})
    batch = next(stream(Batches(TOTAL, 1, TOTAL, 1), 0))
    return len([engine.predict(batch) for _ in range(1 + 2 * world.rank)])


def test_names_never_show_a_wrapper(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda module: module.__setattr__("_compiled_call_impl", None))
    expected = set(make(World()).state())
    assert set(make(World(), recompute=True, compile=True).state()) == expected
    assert "model.layers.0.grow.weight" in expected
    assert "optim.layers.0.grow.weight.exp_avg" in expected
    assert "buffer.offset" in expected
    assert "buffer.scratch" not in expected
    assert "model.layers.2.grow.weight" not in expected  # tied: one tensor, one name
    assert make(World()).aliases == {"layers.2.grow.weight": "layers.0.grow.weight"}


def predictions_between_changes(world, name, reshard):
    """Logits of averaged, plain, averaged weights, a step, then plain and averaged weights."""
    engine = make(world, name, ema=0.5, reshard=reshard)
    steps(engine, world, 2)
    batch = next(stream(Batches(TOTAL, 1, TOTAL, 1), 0))
    found = []

    def ask(averaged):
        with engine.averaged() if averaged else contextlib.nullcontext():
            found.append(engine.predict(batch)["logits"])

    for averaged in (True, False, True):
        ask(averaged)
    steps(engine, world, 1, start=2 * TOTAL)
    for averaged in (False, True):
        ask(averaged)
    return found


def predictions_either_way(world):
    return [predictions_between_changes(world, "fsdp", reshard) for reshard in (True, False)]


def test_predictions_follow_the_weights_whatever_was_asked_before():
    expected = predictions_between_changes(World(), "single", True)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert (expected[1] - expected[3]).abs().max() > 1e-3
    for rank in ranks.run(predictions_either_way, 2):
        for found in rank:  # freed after the forward, or kept
            for ours, reference in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
