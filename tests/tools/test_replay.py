"""The replay command: a real run that stopped on NaN, and what its capsule gives back."""

import json

import pytest

from halfseen import capsule
from halfseen.config import ConfigError
from halfseen.pretrain import train
from halfseen.tools import replay

WRONG = 4 * 16 + 3
RECIPE = [
    "pretrain/demo",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "objective.mae.decoder_width=32",
    "objective.mae.decoder_depth=1",
    "data.image_size=32",
    "data.workers=0",
    "run.images=128",
    "run.global_batch=16",
    "run.micro_batch=8",
    "run.checkpoint_every=32",
    "run.log_every=1 steps",
    "run.picture_every=0",
    "engine.skip_budget=0",
    "engine.rollback_budget=1",
    "monitor.tensorboard=false",
]


@pytest.fixture
def faulty(monkeypatch):
    """An image at one position that the decoder of images got wrong."""
    made = train.Prepare.__call__

    def prepare(self, batch):
        prepared = made(self, batch)
        prepared["image"][batch["position"] == WRONG] = float("nan")
        return prepared

    monkeypatch.setattr(train.Prepare, "__call__", prepare)
    return monkeypatch


@pytest.fixture
def stopped(tmp_path, faulty):
    with pytest.raises(capsule.NotFinite, match="halfseen replay"):
        train.main([*RECIPE, f"run.folder={tmp_path / 'run'}"])
    return tmp_path / "run" / "capsules" / f"img_{64:012d}.json"


def test_the_step_is_taken_again_and_the_sample_named(stopped, capsys, faulty):
    seen = json.loads(stopped.read_text())["seen"][0]
    key = seen["samples"][str(WRONG)]
    assert key
    before = sorted(path for path in stopped.parents[1].rglob("*") if path.is_file())
    capsys.readouterr()
    assert replay.main([str(stopped)]) == 0
    text = capsys.readouterr().out
    assert f"position {WRONG:,}  key {key}" in text
    assert text.count("  position") == 1  # no other sample is suspected
    assert "the batch brings image" in text
    assert "checkpoints/img_000000000064" in text
    assert sorted(path for path in stopped.parents[1].rglob("*") if path.is_file()) == before

    faulty.undo()  # the fault was in the machine, not in the data
    assert replay.main([str(stopped), "data.workers=0"]) == 1
    assert "finite this time" in capsys.readouterr().out

    (stopped.parents[1] / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="run folder"):
        replay.main([str(stopped)])
