"""Contract 3: same config and data, same curve, whatever the engine and the number of ranks."""

import functools

import pytest
import ranks
import torch
from torch import nn
from torch._dynamo.utils import counters
from toys import furthest, make, steps

from halfseen.config import ConfigError
from halfseen.distributed import World

STEPS = 6

# FairScale's checkpoint_wrapper is refused where blocks share a weight, or one is used twice.
UNSHARED = {"tied": False, "twice": False}
FAIRSCALES = {
    "student": UNSHARED,
    "recompute": True,
    "recompute_by": "fairscale",
    "offload_activations": True,
}

# Every variant accumulates over two micro-batches where it does not say otherwise, clips, has layer-wise rates and
# buffers, and but for FairScale's a block used twice and a weight tied between two blocks.
VARIANTS = {
    "plain": {},
    "accumulation 1": {"accumulation": 1},
    "accumulation 3": {"accumulation": 3},
    "average, recompute": {"ema": 0.8, "recompute": True},
    "frozen": {"student": {"frozen": True}, "ema": 0.8},
    "frozen, recompute": {"student": {"frozen": True}, "recompute": True},
    "recompute, inputs on the host": {"recompute": True, "offload_activations": True},
    "recompute by FairScale": FAIRSCALES,
    "recompute by FairScale, frozen": FAIRSCALES | {"student": UNSHARED | {"frozen": True}},
    "recompute by FairScale, bf16": FAIRSCALES | {"precision": "bf16"},
    "compile": {"compile": True},
    "compile, recompute": {"compile": True, "recompute": True},
    "untied, no clip": {"student": {"tied": False}, "optimizer": {"clip": None}},
    "keep gathered": {"reshard": False},
    "lamb": {"optimizer": {"name": "lamb"}},
    "lars": {"optimizer": {"name": "lars"}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "offload": {"offload": True},
    "bf16": {"precision": "bf16"},
    "bf16 gathered": {"precision": "bf16", "gather": "bf16"},
    "fp16": {"precision": "fp16"},
}
BY_FAIRSCALE = tuple(name for name in VARIANTS if name.startswith("recompute by"))
HALF = ("bf16", "recompute by FairScale, bf16", "bf16 gathered", "fp16")
SHARDING = ("offload", "gather", "reshard", "compile", "recompute_by")  # options that the reference does without
FEW = ("plain", "average, recompute", "recompute by FairScale", "frozen", "lamb", "bf16")  # with more than two ranks
TORCH = [("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]
ZERO = [("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero2", 3), ("zero3", 2), ("zero3", 3), ("zero3-kept", 2)]
FAIRSCALE = [("oss", 2), ("sharded", 2), ("sharded", 3)]
ENGINES = TORCH + ZERO + FAIRSCALE
REFUSED = (
    {(f"zero{stage}", name) for stage in (1, 2, 3) for name in ("lamb", "lars")}
    | {("zero3", "compile"), ("zero3", "compile, recompute")}
    | {(name, "offload") for name in ("ddp", "zero0", "oss", "sharded")}
    | {(name, way) for name in ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3") for way in BY_FAIRSCALE}
    | {(name, "bf16 gathered") for name in ("ddp", "zero0", "zero1", "zero2", "zero3", "oss", "sharded")}
    | {(name, "keep gathered") for name in ("ddp", "zero0", "zero1", "zero2", "zero3")}
)


def applies(place, variant):
    """Whether this engine runs this variant here."""
    name, count = place
    if (name.removesuffix("-kept"), variant) in REFUSED or (count > 2 and variant not in FEW):
        return False
    only = {
        "keep gathered": ("fsdp",),
        "offload": ("fsdp", "zero0", "zero1", "zero2", "zero3", "zero3-kept"),
        "bf16 gathered": ("fsdp",),
        "recompute, inputs on the host": ("ddp", "fsdp", "zero3", "sharded"),
        "compile": ("ddp", "fsdp"),
        "compile, recompute": ("ddp", "fsdp", "zero2", "sharded"),
    } | dict.fromkeys(BY_FAIRSCALE, ("oss", "sharded"))
    if variant in only:
        return name in only[variant]
    return name != "zero3-kept" or variant in FEW


CASES = [(place, variant) for place in ENGINES for variant in VARIANTS if applies(place, variant)]


def curves(world, name):
    """History, final weights and averages of each variant."""
    compiler = nn.Module.compile
    nn.Module.compile = lambda module: compiler(module, backend="aot_eager")
    found = {}
    for variant, options in VARIANTS.items():
        if name != "single" and not applies((name, world.world), variant):
            continue
        options = dict(options)
        accumulation = options.pop("accumulation", 1 if world.world == 4 else 2)
        if name == "single":
            accumulation = 1 if variant.startswith("accumulation") else 2
            options = {key: value for key, value in options.items() if key not in SHARDING}
        counters.clear()
        engine = make(world, name, **options)
        history = steps(engine, world, STEPS, accumulation=accumulation)
        averages = engine.weights(ema=True) if options.get("ema") else {}
        assert engine.skipped() == 0
        assert bool(counters["stats"]["unique_graphs"]) == options.get("compile", False)
        found[variant] = history, engine.weights(), averages
    nn.Module.compile = compiler
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
    return ranks.run(curves, count, name, seconds=400)  # many engines, perhaps on a busy machine


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


@pytest.mark.parametrize(("name", "variant"), sorted(REFUSED))
def test_what_the_table_calls_refused_is_refused_with_a_way_out(name, variant):
    with pytest.raises(ConfigError, match="fix: "):
        make(World(), name, **VARIANTS[variant])


@pytest.mark.parametrize("place", ENGINES, ids=title)
def test_every_rank_reports_the_same_numbers(place):
    first, *others = found(place)
    for other in others:
        assert {name: value[0] for name, value in other.items()} == {n: v[0] for n, v in first.items()}
        assert all(weights == {} for _, weights, _ in other.values())


def test_the_variants_are_different_runs(reference):
    """A variant that is not applied would agree with everything."""
    plain = {
        "average, recompute",
        "recompute, inputs on the host",
        "compile",
        "compile, recompute",
        "keep gathered",
        "offload",
        "accumulation 1",
        "accumulation 3",
    }
    losses = {variant: history[-1]["loss"] for variant, (history, _, _) in reference.items()}
    for variant in plain:
        assert losses[variant] == pytest.approx(losses["plain"], rel=1e-6)
    assert losses["frozen"] == losses["frozen, recompute"]
    assert losses["bf16"] == losses["bf16 gathered"]
    others = losses.keys() - plain - {"frozen, recompute", "bf16 gathered"}
    assert len({losses[variant] for variant in others}) == len(others)


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


def test_a_run_repeats_to_the_bit(reference):
    assert steps(make(World()), World(), STEPS) == reference["plain"][0]
