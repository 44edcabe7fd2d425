"""What every stage does around its parts: durations, refusals, data that all ranks share."""

import pytest

from halfseen import data, stage
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


@pytest.mark.parametrize(
    ("override", "key"),
    [("run.images=10", "run.images"), ("optim.warmup=200%", "optim.warmup"), ("run.log_every=0", "run.log_every")],
)
def test_impossible_durations_are_refused(tmp_path, override, key):
    config = load(Pretrain, "pretrain/demo", [*TINY, override])
    with pytest.raises(ConfigError) as refusal:
        pretraining.parts(config, World(), tmp_path)
    assert refusal.value.key == key


def test_the_rate_drops_at_the_times_named_which_must_lie_between_warmup_and_end(tmp_path):
    def spans(drops):
        steps = [
            "optim.schedule=steps",
            "run.images=960",
            "run.global_batch=48",
            "optim.warmup=96",
            f"optim.drops={drops}",
        ]
        config = load(Pretrain, "pretrain/demo", [*TINY, *steps])
        return pretraining.parts(config, World(), tmp_path).schedule(config)

    assert spans("[50%,'720']").drops == (480, 720)
    for outside in ("[5%]", "[100%]"):
        with pytest.raises(ConfigError) as refusal:
            spans(outside)
        assert refusal.value.key == "optim.drops"


def test_the_run_ends_on_a_whole_step(tmp_path):
    config = load(Pretrain, "pretrain/demo", [*TINY, "run.images=100", "run.global_batch=48", "optim.warmup=0"])
    assert pretraining.parts(config, World(), tmp_path).spans.total == 144


def test_weights_that_are_none_are_refused_under_the_option_that_named_them(tmp_path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no weights at all")
    config = load(Pretrain, "pretrain/demo", [*TINY, f"run.init={junk}"])
    with pytest.raises(ConfigError) as refused:
        stage.initialise(None, config, World())
    assert (refused.value.key, refused.value.value) == ("run.init", str(junk))


def test_what_the_number_of_ranks_makes_impossible_is_refused_before_they_meet(monkeypatch, tmp_path):
    """No rank waits for another to hear it: the launcher's variables are enough."""

    def refused(*options):
        with pytest.raises(ConfigError) as error:
            stage.open_run(Pretrain, ["pretrain/demo", f"run.folder={tmp_path / 'run'}", *options])
        return error.value.key

    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert refused("run.global_batch=16") == "run.global_batch"
    assert refused("engine.name=single") == "engine.name"
    assert refused("engine.name=fsdp", "engine.shard_size=2") == "engine.shard_size"
    assert refused("engine.name=deepspeed", "optim.name=lamb") == "optim.name"
    assert refused("engine.name=deepspeed", "engine.extra=/nowhere.json") == "engine.extra"
    assert refused("engine.offload=true") == "engine.offload"
    assert not (tmp_path / "run").exists()
