"""Codes on disk: those of the tokenizer, every one; the run that reads them is the run that asks."""

import pytest
import torch

from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.pretrain import store, train
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load
from halfseen.tools import teach

SHARED = [
    *("data.train=embedded:emoji/train", "data.image_size=32", "data.workers=0", "engine.device=cpu"),
    *("model.width=32", "model.depth=2", "model.heads=2", "model.patch=8", "optim.warmup=0", "run.log_every=64"),
    *("run.global_batch=64", "monitor.tensorboard=false", "run.async_save=false", "run.picture_every=0"),
]
DVAE = [
    *("objective.name=dvae", "mask.kind=none", "target.normalise=false", "run.images=64"),
    *("objective.dvae.codes=16", "objective.dvae.channels=8", "objective.dvae.width=8"),
]
# The tokenizer has a view of its own, of another size, as DALL-E's has.
BEIT = [
    *("model.patch=16", "data.image_size=64", "objective.name=mim", "mask.kind=block", "mask.min_block=2"),
    *("mask.ratio=0.5", "target.name=codes", "target.codes.image_size=32", "augment.jitter=0.4"),
    *("run.images=512", "target.codes.store.shard_images=256"),
]


def run(stage, folder, *options):
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text("stage: pretrain\n")
    return stage([str(recipe), *SHARED, *options])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer and a store of 512 positions."""
    place = tmp_path_factory.mktemp("codes")
    assert run(train.main, place / "dvae", *DVAE, f"run.folder={place / 'dvae'}") == 0
    assert run(teach.main, place / "teach", *options(place)) == 0
    return place


def options(place, *more):
    asked = [f"target.codes.tokenizer={place / 'dvae'}", f"target.codes.store.folder={place / 'store'}"]
    return [*BEIT, *asked, *more]


def parts(folder, *overrides):
    return train.parts(load(Pretrain, None, [*SHARED, *overrides]), World(), folder)


def live(place):
    return options(place, "target.codes.store.folder=")


def test_stored_codes_are_the_live_ones(place, tmp_path, monkeypatch):
    asked = parts(tmp_path, *live(place))
    monkeypatch.setattr(train.stored_codes.targets, "create", None)  # reading needs no tokenizer
    stored = parts(tmp_path, *options(place))
    for start in (0, 64, 256, 448):
        raw = next(stored.stream(start))
        assert "view" not in raw
        one, other = stored.prepare(raw), asked.prepare(next(asked.stream(start)))
        assert one.keys() == other.keys() - {"view"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert other["target"].unique().numel() > 1


def test_a_run_from_the_store_is_the_run_that_asks(place, tmp_path):
    assert run(train.main, tmp_path / "live", *live(place), f"run.folder={tmp_path / 'live'}", "run.images=256") == 0
    assert run(train.main, tmp_path / "kept", *options(place), f"run.folder={tmp_path / 'kept'}", "run.images=256") == 0
    one, other = (read_weights(tmp_path / name) for name in ("live", "kept"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.seed=1", "target.codes.store.folder"),
        ("augment.jitter=0", "augment.jitter"),
        ("target.codes.precision=bf16", "target.codes.precision"),
        ("data.limit=500", "target.codes.store.folder"),
        ("run.images=1024", "target.codes.store.folder"),
    ],
)
def test_another_store_or_a_shorter_one_is_refused(place, tmp_path, override, key):
    with pytest.raises(ConfigError) as refused:
        parts(tmp_path, *options(place, override))
    assert refused.value.key == key


def test_another_tokenizer_is_noticed_where_it_is_loaded(place, tmp_path):
    live = "target.codes.store.missing=live"
    parts(tmp_path, *options(place, live))
    described = (place / "store" / store.DESCRIPTION).read_text()
    digest = described[described.index("tokenizer.digest") :].split('"')[2]
    (place / "store" / store.DESCRIPTION).write_text(described.replace(digest, "0" * 64))
    try:
        with pytest.raises(ConfigError) as refused:
            parts(tmp_path, *options(place, live))
        assert refused.value.key == "tokenizer.digest"
    finally:
        (place / "store" / store.DESCRIPTION).write_text(described)


def test_what_is_missing_is_asked_live_and_a_short_store_can_repeat(place, tmp_path):
    longer = parts(tmp_path, *options(place, "run.images=1024", "target.codes.store.missing=live"))
    asked = parts(tmp_path, *live(place))
    ours, theirs = (made.prepare(next(made.stream(512)))["target"] for made in (longer, asked))
    assert torch.equal(ours, theirs)
    again = ["run.images=1024", "target.codes.store.images=256", "target.codes.store.repeat=true"]
    repeating = parts(tmp_path, *options(place, *again))
    first, later = (repeating.prepare(next(repeating.stream(start))) for start in (64, 320))
    assert all(torch.equal(first[name], later[name]) for name in ("image", "mask", "target"))


def test_the_audit_asks_the_tokenizer_again(place, capsys):
    assert run(teach.main, place / "audit", *options(place), "--audit", "2") == 0
    assert "codes 0.00e+00" in capsys.readouterr().out


def test_only_codes_are_stored(place):
    with pytest.raises(ConfigError) as refused:
        run(teach.main, place / "pixels", f"target.codes.store.folder={place / 'other'}")
    assert refused.value.key == "target.name"
    with pytest.raises(ConfigError, match="belongs to finetune"):
        teach.main(["finetune/demo", "store.folder=nowhere"])
