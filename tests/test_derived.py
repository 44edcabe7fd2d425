"""Derived numbers: how a global batch is split, and a run's durations in images."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfseen.config import ConfigError, Optim, Run
from halfseen.derived import Batches, Spans
from halfseen.recipes import load


@dataclass
class Small:
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 300))
def test_batch_split_multiplies_back_and_respects_the_limit(share, world, limit):
    largest = max(size for size in range(1, min(share, limit) + 1) if share % size == 0)
    if 2 * largest <= min(share, limit):
        # A prime share, say: running one image at a time is not what was asked for.
        with pytest.raises(ConfigError, match=r"run\.micro_batch"):
            Batches.derive(share * world, world, limit)
        return
    split = Batches.derive(share * world, world, limit)
    assert split.world * split.accumulation * split.micro == share * world
    assert split.micro == largest


def test_an_indivisible_global_batch_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"run\.global_batch=4098"):
        Batches.derive(4096, 6, None)


def spans(*overrides: str) -> Spans:
    """Of a run over 100 images, in steps of 48."""
    return Spans.derive(load(Small, None, ["run.images=960", "optim.warmup=96", *overrides]), epoch=100, batch=48)


@pytest.mark.parametrize(
    ("override", "key"),
    [("run.images=10", "run.images"), ("optim.warmup=200%", "optim.warmup"), ("run.log_every=0", "run.log_every")],
)
def test_impossible_durations_are_refused(override, key):
    with pytest.raises(ConfigError) as refusal:
        spans(override)
    assert refusal.value.key == key


def test_the_rate_drops_at_times_between_warmup_and_end():
    assert spans("optim.schedule=steps", "optim.drops=[50%,'720']").drops == (480, 720)
    for outside in ("[5%]", "[100%]"):
        with pytest.raises(ConfigError) as refusal:
            spans("optim.schedule=steps", f"optim.drops={outside}")
        assert refusal.value.key == "optim.drops"


def test_the_run_ends_on_a_whole_step():
    assert spans("run.images=100", "optim.warmup=0").total == 144
