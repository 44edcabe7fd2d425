"""What every stage does around its parts: what it announces, data that all ranks share, starting weights."""

from pathlib import Path

import pytest
import torch

from halfseen import data, opening, stage
from halfseen.checkpoint import Checkpoints
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.pretrain import train as pretraining
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load

TINY = ["model.width=32", "model.depth=1", "model.heads=2", "data.image_size=32", "objective.mae.decoder_width=32"]


class Ranks(World):
    """A world whose other ranks give made-up answers."""

    def gather_object(self, value):
        return [value, *self.others]


def test_any_number_of_ranks_that_divides_the_batch_may_run(tmp_path, capsys):
    config = load(Pretrain, "pretrain/demo", [*TINY, "run.global_batch=48"])
    world = World(world=3)
    parts = pretraining.parts(config, world, tmp_path)
    assert (parts.batches.world, parts.batches.micro) == (3, 16)
    stage.announce(config, "runs/x", parts, world)
    assert "data.lanes=64 is not a multiple of 3 ranks" in capsys.readouterr().out


def test_ranks_that_see_other_shards_are_refused_by_name():
    config = load(Pretrain, "pretrain/demo", TINY)
    world = Ranks(world=2)
    world.others = ["another fingerprint"]
    with pytest.raises(ConfigError, match="rank 1 sees other shards"):
        stage.derive(config, data.open_set(config.data, "train"), world)


def test_pretraining_needs_no_labels_whatever_the_recipe_says(tmp_path):
    config = load(Pretrain, "pretrain/demo", [*TINY, "data.label=cls", "data.classes=1000", "data.workers=0"])
    parts = pretraining.parts(config, World(), tmp_path)
    batch = next(parts.stream(0))
    assert "label" not in batch
    assert len(batch["key"]) == parts.batches.micro


def test_the_schedule_has_the_times_at_which_the_rate_drops(tmp_path):
    steps = ["optim.schedule=steps", "run.images=960", "run.global_batch=48", "optim.warmup=96", "optim.drops=[50%]"]
    config = load(Pretrain, "pretrain/demo", [*TINY, *steps])
    assert pretraining.parts(config, World(), tmp_path).schedule(config).drops == (480,)


def test_weights_that_are_none_are_refused_under_the_option_that_named_them(tmp_path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no weights at all")
    config = load(Pretrain, "pretrain/demo", [*TINY, f"run.init={junk}"])
    with pytest.raises(ConfigError) as refused:
        stage.initialise(None, config, World())
    assert (refused.value.key, refused.value.value) == ("run.init", str(junk))


def test_a_run_whose_checkpoints_are_all_damaged_never_begins_anew(tmp_path, capsys):
    """Weeks of training must not be trained over because a disk was away."""
    store = Checkpoints(tmp_path / "checkpoints", 3, World())
    (store.save(10, {"model.a": torch.zeros(1)}, {}) / "manifest.json").write_text("")
    with pytest.raises(ConfigError, match=r"run\.folder=.*none of its 1 checkpoints is healthy"):
        stage.restored(None, None, World(), store)
    assert "img_000000000010 passed over" in capsys.readouterr().err


def test_half_a_config_is_no_config(tmp_path, monkeypatch):
    """A start that is killed while it writes leaves a folder in which the same command begins."""
    write = Path.write_text

    def killed(path, text):
        write(path, text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", killed)
    opened = opening.Opened(load(Pretrain, "pretrain/demo"), tmp_path, False)
    with pytest.raises(OSError, match="no space"):
        stage.record(opened, None, World(), None, 0)
    assert not (tmp_path / "config.yaml").exists()
