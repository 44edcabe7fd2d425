"""FairScale's checkpoint_wrapper: right where it is offered, refused where it is not. Parity is in test_parity.py."""

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn
from toys import NAMED, TOTAL, furthest, make, steps, stream

from halfseen.config import ConfigError
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.engines.fairscale_checkpoint import Unit, put_together, refuse_sharing, taken_apart
from halfseen.pretrain import train
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load

BY_FAIRSCALE = {"recompute": True, "recompute_by": "fairscale"}


def refused(world, student):
    """The error of the first step, or of making the engine."""
    with pytest.raises(ConfigError) as error:
        steps(make(world, "oss", student=student, **BY_FAIRSCALE), world, 1)
    return str(error.value)


def refusals(world):
    return [refused(world, {}), refused(world, {"tied": False})]


def test_shared_weights_are_refused_with_the_alternative():
    """As what happens without the refusal, DDP's own error, would not say what to do."""
    tied, twice = ranks.run(refusals, 1)[0]
    assert "layers.2.grow.weight is a weight of another block too" in tied
    assert "called twice in a step" in twice
    for text in (tied, twice):
        assert "engine.recompute_by='fairscale'" in text
        assert "fix: use engine.recompute_by=torch" in text


def test_it_needs_recomputation_without_compilation():
    for options in ({}, {"recompute": True, "compile": True}):
        with pytest.raises(ConfigError, match=r"engine\.recompute_by='fairscale'.*\n.*recompute=true"):
            make(World(), "oss", recompute_by="fairscale", **options)


def unguarded(world):
    """What the wrapper itself does with a block that is used twice, and to autocast."""
    from fairscale.nn.checkpoint import checkpoint_wrapper

    engine = make(world, "oss")
    for block in engine.student.blocks():
        checkpoint_wrapper(block)
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        steps(engine, world, 1)
    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = checkpoint_wrapper(nn.Sequential(layer))(torch.ones(1, 2, requires_grad=True))
    result.float().sum().backward()
    return seen


def test_why_it_is_refused_and_mended():
    """If FairScale mends these, the refusal and the mending can go."""
    assert ranks.run(unguarded, 2) == [[torch.bfloat16, torch.float32]] * 2


def every_way(world):
    """Of each way to recompute: keys of the state, a curve with dropout, and answers and norms between its steps."""
    student = {"dropout": 0.5, "tied": False, "twice": False}
    ways = ({}, {"recompute": True}, BY_FAIRSCALE, BY_FAIRSCALE | {"offload_activations": True})
    found = []
    for way in ways:
        engine = make(world, "oss", student=student, **way)
        batch = next(stream(Batches(TOTAL, 1, TOTAL, 1), 0))
        history = steps(engine, world, 2)
        answer, norm = engine.predict(batch)["logits"], engine.norms(batch, ["loss"])["loss"]
        found.append((sorted(engine.state()), history + steps(engine, world, 2, start=2 * TOTAL), answer, norm))
    return found


def test_it_replays_dropout_and_leaves_no_trace_in_names_answers_or_norms():
    keys, history, answer, norm = (plain := ranks.run(every_way, 1)[0])[0]
    assert "model.layers.0.grow.weight" in keys
    for our_keys, ours, our_answer, our_norm in plain[1:]:
        assert our_keys == keys
        assert ours == history
        assert torch.equal(our_answer, answer)
        assert torch.equal(our_norm, norm)


# ------------------------------------------------------------------------------------------------ real blocks


def masked(world, options):
    """Scalars of a few steps of MAE, whose decoder begins with rows that samples have in common."""
    chosen = [f"engine.{name}={str(value).lower()}" for name, value in options.items()]
    small = ["model.width=32", "model.depth=2", "model.heads=2", "data.image_size=32", "objective.mae.decoder_width=32"]
    run = ["data.workers=0", "run.images=64", "run.global_batch=16", "run.micro_batch=4", "engine.device=cpu"]
    cfg = load(Pretrain, "pretrain/demo", [*small, *run, "objective.mae.decoder_depth=2", *chosen])
    parts = train.parts(cfg, world, Path())
    engine, stream, history = parts.engine(cfg, world, fresh=True), parts.stream(0), []
    for position in range(0, 48, 16):
        batches = [parts.prepare(next(stream)) for _ in range(parts.batches.accumulation)]
        history.append({name: float(value) for name, value in engine.step(batches, 1e-3, position).items()})
    return history


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mae_by_fairscale_is_mae(precision):
    expected, plain = masked(World(), {"name": "single", "precision": precision}), NAMED["oss"]
    found = ranks.run(masked, 2, plain | BY_FAIRSCALE | {"offload_activations": True, "precision": precision})[0]
    assert furthest(expected, found, "loss", "grad_norm") < {"fp32": 1e-5, "bf16": 2e-2}[precision]


# ------------------------------------------------------------------------------------------------ taking apart


@dataclass(frozen=True)
class Pair:
    """An object with a tensor in it."""

    left: torch.Tensor
    right: object = None


Named = namedtuple("Named", "here there")


def test_what_is_taken_apart_is_put_together_again():
    first, second = torch.ones(2), torch.zeros(3)
    value = ({"a": [first, 3], "b": Pair(second, (first, None)), "c": Named(second, 1)}, "text", False)
    tensors = []
    form = taken_apart(value, tensors)
    assert [id(tensor) for tensor in tensors] == [id(first), id(second)]  # each once
    again = put_together(form, [first + 1, second + 1])
    assert again[1:] == ("text", False)
    assert again[0]["a"][1] == 3
    torch.testing.assert_close(again[0]["b"].right[0], first + 1)
    torch.testing.assert_close(again[0]["b"].left, second + 1)
    assert again[0]["c"].here is again[0]["b"].left
    assert put_together(form, tensors)[0]["a"][0] is first


class Tracing(nn.Module):
    """A block that gives its result twice, and something from within."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, pair):
        inner = self.one(x)
        result = self.two(inner.tanh()) + pair.left
        return result, [inner, result]


def gradients(call, block):
    torch.manual_seed(2)
    x, left = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    result, (inner, again) = call(x, Pair(left))
    (result.square().sum() + 3 * inner.sum() + again.sin().sum()).backward()
    found = [x.grad, left.grad, *(parameter.grad for parameter in block.parameters())]
    block.zero_grad(set_to_none=True)
    return found


def test_gradients_pass_through_every_tensor_of_a_block():
    block = Tracing()
    plain = gradients(block, block)
    for offload in (False, True):
        torch.testing.assert_close(gradients(Unit(block, offload).call, block), plain)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_block_is_computed_again_in_the_type_it_was_computed_in(enabled):
    """The wrapper alone would recompute bf16 in float32 here: losses are too alike to show it."""
    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    unit = Unit(nn.Sequential(layer), offload=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        result = unit.call(torch.ones(1, 2, requires_grad=True))
    result.float().sum().backward()
    assert seen == [torch.bfloat16 if enabled else torch.float32] * 2


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_frozen_block_gets_no_gradient_and_passes_none():
    block = Tracing().requires_grad_(False)
    result, _ = Unit(block, offload=False).call(torch.ones(1, 4), Pair(torch.ones(4)))
    assert not result.requires_grad


def test_weights_around_the_blocks_may_be_shared():
    """Only a block's own weights are ready in a backward of its own."""
    student = nn.ModuleDict({"in": nn.Linear(2, 2), "block": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    student["out"].weight = student["in"].weight
    refuse_sharing(student, [student["block"]])
    student["block"].weight = student["in"].weight
    with pytest.raises(ConfigError, match="another block"):
        refuse_sharing(student, [student["block"]])
    refuse_sharing(student.requires_grad_(False), [student["block"]])


@pytest.mark.parametrize("place", ["other", "head"])
def test_a_module_in_two_places_is_a_shared_weight(place):
    """torch lists it once."""
    blocks = {"one": nn.Sequential(nn.Linear(2, 2)), "other": nn.Sequential(nn.Linear(2, 2))}
    student = nn.ModuleDict(blocks | {"head": nn.Linear(2, 2)})
    if place == "head":
        student["head"] = student["one"][0]
    else:
        student["other"][0] = student["one"][0]
    with pytest.raises(ConfigError, match=rf"{place}\..*weight is a weight of another block"):
        refuse_sharing(student, [student["one"], student["other"]])
