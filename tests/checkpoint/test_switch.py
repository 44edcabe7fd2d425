"""Contract 4: a run saved by any engine at any world size continues under any other with the same curve."""

import functools
import tempfile
from pathlib import Path

import pytest
import ranks
import torch
from toys import TOTAL, furthest, make, steps

from halfseen.checkpoint import Checkpoints
from halfseen.distributed import World

OPTIONS = {"ema": 0.8, "student": {"dropout": 0.0}}
PLACES = [
    ("single", 1),
    ("ddp", 2),
    ("fsdp", 1),
    ("fsdp", 2),
    ("fsdp", 3),
    ("zero0", 2),
    ("zero1", 2),
    ("zero2", 3),
    ("zero3", 1),
    ("zero3", 2),
    ("oss", 2),
    ("sharded", 3),
]
HALF = 3
FOLDER = tempfile.TemporaryDirectory(prefix="switch-")


def on(function, name, world, *arguments):
    """Every rank's result of function(world, name, *arguments); in this process when there is one plain rank."""
    if name == "single":
        return [function(World(), name, *arguments)]
    return ranks.run(function, world, name, *arguments)


def title(place):
    return f"{place[0]}-{place[1]}"


def save_half(world, name, folder):
    engine = make(world, name, **OPTIONS)
    steps(engine, world, HALF)
    meta = {"aliases": engine.aliases}
    Checkpoints(folder, 3, world).save(HALF * TOTAL, engine.state(), meta)
    return steps(engine, world, HALF, start=HALF * TOTAL), engine.weights(), engine.weights(ema=True)


def continue_half(world, name, folders):
    """From each folder in turn, over other weights and moments: at last those of the folder before, gone on."""
    engine = make(world, name, seed=6, **OPTIONS)
    steps(engine, world, 1)
    found = []
    for folder in folders:
        checkpoints = Checkpoints(folder, 3, world)
        state = engine.state()
        meta = checkpoints.load(checkpoints.newest(), state)
        engine.load_state(state)
        assert meta["position"] == HALF * TOTAL
        history = steps(engine, world, HALF, start=meta["position"])
        found.append((history, engine.weights(), engine.weights(ema=True)))
    return found


@functools.cache
def written(place):
    """Where this engine left its half, and how it went on itself."""
    folder = Path(FOLDER.name) / title(place) / "checkpoints"
    return folder, on(save_half, *place, folder)[0]


@functools.cache
def continued(place):
    """How this engine went on from every engine's half."""
    folders = [written(writer)[0] for writer in PLACES]
    return dict(zip(PLACES, on(continue_half, *place, folders)[0], strict=True))


@pytest.mark.parametrize("writer", PLACES, ids=lambda place: f"from {title(place)}")
@pytest.mark.parametrize("reader", PLACES, ids=lambda place: f"to {title(place)}")
def test_every_engine_continues_what_any_engine_wrote(writer, reader):
    _, (history, weights, averages) = written(writer)
    again, our_weights, our_averages = continued(reader)[writer]
    if reader == writer:
        assert again == history
        for name, value in weights.items():
            assert torch.equal(our_weights[name], value), name
        for name, value in averages.items():
            assert torch.equal(our_averages[name], value), name
    assert furthest(history, again, "loss", "grad_norm") < 1e-6
    for name, value in (weights | averages).items():
        torch.testing.assert_close((our_weights | our_averages)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("writer", PLACES, ids=title)
def test_the_second_half_needs_the_first(writer):
    """The continued curve is not what a run without the checkpoint would give."""
    _, (history, _, _) = written(writer)
    fresh = steps(make(World(), **OPTIONS), World(), HALF, start=HALF * TOTAL)
    assert furthest(history, fresh, "loss") > 1e-2


def exchange(world, name):
    """A whole state in memory, given to a sharded engine."""
    source = make(World(), "single", **OPTIONS)
    steps(source, World(), 3)
    engine = make(world, name, **OPTIONS)
    engine.load_state(source.state())
    history = steps(engine, world, 2, start=3 * TOTAL)
    with pytest.raises(ValueError, match=r"missing \['scaler\.growth'"):
        engine.load_state({k: v for k, v in source.state().items() if not k.startswith("scaler")})
    return history


@pytest.mark.parametrize("name", ["fsdp", "zero2", "oss"])
def test_a_sharded_engine_takes_whole_tensors(name):
    source = make(World(), "single", **OPTIONS)
    steps(source, World(), 3)
    expected = steps(source, World(), 2, start=3 * TOTAL)
    assert furthest(expected, ranks.run(exchange, 2, name)[0], "loss", "grad_norm") < 1e-6
