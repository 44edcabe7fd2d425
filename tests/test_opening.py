"""Opening a run: which folder it is, and what is refused before anything is read or written."""

from pathlib import Path

import pytest

from halfseen.config import ConfigError
from halfseen.finetune.config import Finetune
from halfseen.opening import open_run
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load, to_yaml


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain/demo", "--help"], ["pretrain/demo", "run.seed=1", "-h"]])
def test_help_anywhere_prints_the_usage_of_a_stage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        open_run(Pretrain, arguments)
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: halfseen pretrain ")


def stored(schema, folder):
    """A run folder that holds nothing but its config."""
    folder.mkdir(parents=True)
    config = schema()
    config.run.folder = str(folder)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.mark.parametrize("name", ["1e3", "a=b: c, [d", "True"])
def test_a_run_folder_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = stored(Pretrain, tmp_path / name)
    opened = open_run(Pretrain, [name])
    assert opened.resumed
    assert opened.config.run.folder == name
    assert opened.folder.resolve() == folder.resolve()


def test_a_file_is_refused_as_run_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"run\.folder=.*is a file"):
        open_run(Pretrain, ["pretrain/demo", f"run.folder={tmp_path / 'taken'}"])


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"run\.folder=.*taken is a file"):
        open_run(Pretrain, ["pretrain/demo", f"run.folder={tmp_path / 'taken' / 'run'}"])
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may write everywhere
    with pytest.raises(ConfigError, match=rf"run\.folder=.*: {tmp_path} cannot be written"):
        open_run(Pretrain, ["pretrain/demo", f"run.folder={tmp_path / 'a' / 'b'}"])


def test_two_stages_of_one_name_do_not_meet_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_run(Finetune, ["finetune/mae_b16"]).folder == Path("runs/mae_b16")
    stored(Pretrain, tmp_path / "runs" / "mae_b16")
    begun = open_run(Finetune, ["finetune/mae_b16", "run.init=runs/mae_b16"])  # as the recipe's head says
    assert begun.folder == Path("runs/mae_b16_finetune")
    assert begun.config.run.folder == "runs/mae_b16_finetune"
    (tmp_path / begun.folder).mkdir()
    (tmp_path / begun.folder / "config.yaml").write_text(to_yaml(begun.config))
    again = open_run(Finetune, ["finetune/mae_b16", "run.init=runs/mae_b16"])
    assert again.resumed
    assert again.folder == begun.folder
    assert open_run(Pretrain, ["pretrain/mae_b16_hmlp"]).folder == Path("runs/mae_b16_hmlp")


def test_a_recipe_or_run_of_another_stage_names_the_right_command(tmp_path):
    with pytest.raises(ConfigError, match="fix: halfseen finetune finetune/demo"):
        open_run(Pretrain, ["finetune/demo"])
    folder = stored(Pretrain, tmp_path / "run")
    with pytest.raises(ConfigError, match=f"fix: halfseen pretrain {folder}"):
        open_run(Finetune, [str(folder)])
    with pytest.raises(ConfigError, match=r"belongs to pretrain.*\n.*run\.folder=ANOTHER_FOLDER"):
        open_run(Finetune, ["finetune/demo_scratch", f"run.folder={folder}"])
    (tmp_path / "own.yaml").write_text("stage: finetune\n")
    with pytest.raises(ConfigError, match=r"fix: halfseen finetune .*own\.yaml"):
        open_run(Pretrain, [str(tmp_path / "own.yaml")])


def test_weights_that_are_not_there_are_refused_before_anything_is_opened(tmp_path):
    given = ["pretrain/demo", "data.train=nowhere", f"run.init={tmp_path / 'none.pth'}"]
    with pytest.raises(ConfigError, match=r"run\.init=.*none\.pth.*no such file"):
        open_run(Pretrain, [*given, f"run.folder={tmp_path / 'run'}"])
    (tmp_path / "none.pth").write_bytes(b"")
    assert not open_run(Pretrain, [*given, f"run.folder={tmp_path / 'run'}"]).resumed


def test_what_the_number_of_ranks_makes_impossible_is_refused_before_they_meet(monkeypatch, tmp_path):
    """No rank waits for another to hear it: the launcher's variables are enough."""

    def refused(*options):
        with pytest.raises(ConfigError) as error:
            open_run(Pretrain, ["pretrain/demo", f"run.folder={tmp_path / 'run'}", *options])
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


@pytest.mark.parametrize(
    ("began", "goes_on"),
    [
        (["engine.name=deepspeed", "engine.zero_stage=3"], ["engine.name=fsdp"]),
        (["engine.name=fsdp", "engine.offload=true", "engine.reshard=false"], ["engine.name=ddp"]),
        (["engine.name=fairscale", "engine.fairscale=sharded"], ["engine.name=deepspeed", "engine.zero_stage=1"]),
    ],
)
def test_another_engine_is_one_word(tmp_path, began, goes_on):
    """What the stored config says of the engine that is left would be refused under the new one."""
    (tmp_path / "config.yaml").write_text(to_yaml(load(Pretrain, "pretrain/demo", began)))
    engine = open_run(Pretrain, [str(tmp_path), *goes_on]).config.engine
    assert engine == load(Pretrain, "pretrain/demo", goes_on).engine
    assert open_run(Pretrain, [str(tmp_path)]).config.engine == load(Pretrain, "pretrain/demo", began).engine


def test_an_option_of_the_engine_that_is_left_must_not_be_stated_again(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load(Pretrain, "pretrain/demo")))
    with pytest.raises(ConfigError, match=r"engine\.zero_stage=3: is an option of deepspeed.*ignored by ddp"):
        open_run(Pretrain, [str(tmp_path), "engine.name=ddp", "engine.zero_stage=3"])
