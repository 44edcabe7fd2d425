"""Contract 3: same config and data, same curve, whatever the engine and the number of ranks."""

import functools

import pytest
import ranks
import torch
from toys import furthest, make, steps

from halfseen.distributed import World

STEPS = 10

# Every variant accumulates over two micro-batches, clips, has layer-wise rates, a block used twice, a weight tied
# between two blocks, and buffers.
VARIANTS = {
    "plain": {},
    "average, recompute": {"ema": 0.8, "recompute": True},
    "frozen": {"student": {"frozen": True}, "ema": 0.8},
    "frozen, recompute": {"student": {"frozen": True}, "recompute": True},
    "untied, no clip": {"student": {"tied": False}, "optimizer": {"clip": None}},
    "keep gathered": {"reshard": False},
    "lamb": {"optimizer": {"name": "lamb"}},
    "lars": {"optimizer": {"name": "lars"}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "offload": {"offload": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}
HALF = ("bf16", "fp16")
FEW = ("plain", "average, recompute", "frozen", "lamb", "bf16")  # with more than two ranks
TORCH = [("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]
ZERO = [("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero2", 3), ("zero3", 2), ("zero3", 3), ("zero3-kept", 2)]
FAIRSCALE = [("oss", 2), ("sharded", 2), ("sharded", 3)]
ENGINES = TORCH + ZERO + FAIRSCALE
REFUSED = {(f"zero{stage}", name) for stage in (1, 2, 3) for name in ("lamb", "lars")} | {("zero0", "offload")}


def applies(place, variant):
    """Whether this engine runs this variant here; what it refuses is tested in test_create.py."""
    name, count = place
    if (name.removesuffix("-kept"), variant) in REFUSED or (count > 2 and variant not in FEW):
        return False
    if variant == "keep gathered":
        return name in ("ddp", "fsdp")
    if variant == "offload":
        return "zero" in name
    return name != "zero3-kept" or variant in FEW


CASES = [(place, variant) for place in ENGINES for variant in VARIANTS if applies(place, variant)]


def curves(world, name):
    """History, final weights and averages of each variant."""
    found = {}
    for variant, options in VARIANTS.items():
        if name != "single" and not applies((name, world.world), variant):
            continue
        engine = make(world, name, **options)
        history = steps(engine, world, STEPS, accumulation=1 if world.world == 4 else 2)
        averages = engine.weights(ema=True) if options.get("ema") else {}
        assert engine.skipped() == 0
        found[variant] = history, engine.weights(), averages
    return found


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)  # as every rank does: the last bits depend on it
    return curves(World(), "single")


def title(value):
    return value if isinstance(value, str) else f"{value[0]}-{value[1]}"


@functools.cache
def found(place):
    """Every rank's curves under one engine."""
    name, count = place
    return ranks.run(curves, count, name)


@pytest.mark.parametrize(("place", "variant"), [case for case in CASES if case[1] not in HALF], ids=title)
def test_fp32_losses_and_gradient_norms_agree_to_1e6(reference, place, variant):
    expected, weights, averages = reference[variant]
    history, ours, our_averages = found(place)[0][variant]
    assert furthest(expected, history, "loss", "grad_norm", "largest") < 1e-6
    assert ours.keys() == weights.keys()
    assert our_averages.keys() == averages.keys()
    for name, weight in (weights | averages).items():
        torch.testing.assert_close((ours | our_averages)[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("place", "variant"), [case for case in CASES if case[1] in HALF], ids=title)
def test_half_precision_agrees_loosely(reference, place, variant):
    assert furthest(reference[variant][0], found(place)[0][variant][0], "loss", "grad_norm") < 2e-2


@pytest.mark.parametrize("place", ENGINES, ids=title)
def test_every_rank_reports_the_same_numbers(place):
    first, *others = found(place)
    for other in others:
        assert {name: value[0] for name, value in other.items()} == {n: v[0] for n, v in first.items()}
        assert all(weights == {} for _, weights, _ in other.values())


def test_the_variants_are_different_runs(reference):
    """A variant that is not applied would agree with everything."""
    losses = [history[-1]["loss"] for variant, (history, _, _) in reference.items()]
    same = {"average, recompute", "keep gathered", "offload"}  # must not change the curve
    assert len(set(losses)) == len(VARIANTS) - len(same) - 1  # nor does recomputing what is frozen
    assert reference["plain"][0] == reference["average, recompute"][0]


def test_the_run_learns_and_clips(reference):
    history = reference["plain"][0]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert all(step["grad_norm"] > 0.05 for step in history)  # the clip: it was active, and the norm is before it
    assert reference["untied, no clip"][0][-1]["loss"] != history[-1]["loss"]


def alone(world, name):
    return steps(make(world, name), world, STEPS)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "oss"])
def test_one_rank_gives_the_same_bits(reference, name):
    assert ranks.run(alone, 1, name)[0] == reference["plain"][0]


def test_accumulation_does_not_change_the_curve(reference):
    whole = steps(make(World()), World(), STEPS, accumulation=1)
    thirds = steps(make(World()), World(), STEPS, accumulation=3)
    assert furthest(reference["plain"][0], whole, "loss", "grad_norm") < 1e-6
    assert furthest(reference["plain"][0], thirds, "loss", "grad_norm") < 1e-6


def test_a_run_repeats_to_the_bit(reference):
    assert steps(make(World()), World(), STEPS) == reference["plain"][0]
