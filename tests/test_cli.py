"""The command line: every command exists, wrong ones are explained."""

import errno
import importlib
import subprocess
import sys

import pytest

from halfseen import capsule
from halfseen.cli import COMMANDS, run_stage
from halfseen.config import ConfigError
from halfseen.data.ledger import TooManyBad
from halfseen.data.reader import StaleIndex
from halfseen.finetune.config import Finetune
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import to_yaml
from halfseen.stage import open_run


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "halfseen", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_main(name):
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


def test_help_lists_every_command():
    result = command("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in COMMANDS)


def test_a_typo_is_answered_with_the_near_command():
    result = command("pretrian")
    assert result.returncode == 2
    assert "Did you mean 'pretrain'" in result.stderr


def test_a_refused_option_is_a_short_message_not_a_traceback():
    result = command("pretrain", "pretrain/mae_b16", "model.stem=hmpl")
    assert result.returncode == 2
    assert "model.stem" in result.stderr
    assert "fix:" in result.stderr
    assert "Traceback" not in result.stderr


def test_recipes_lists_what_can_be_run_apart_from_bases():
    runs, _, bases = command("recipes").stdout.partition("\n\nbases for other recipes:\n")
    assert {line.split("/")[0] for line in runs.splitlines()} == {"pretrain", "distill", "finetune", "segment"}
    bases, _, resources = bases.partition("\n\nresources and chains for halfseen launch:\n")
    assert {line.split("/")[0] for line in bases.splitlines()} == {"data", "engine"}
    assert {line.split("/")[0] for line in resources.splitlines()} == {"launch"}


def test_recipes_lists_and_describes():
    assert "pretrain/mae_b16_hmlp" in command("recipes").stdout
    fields = command("recipes", "--fields", "pretrain").stdout
    assert "mask.ratio = 0.75" in fields
    assert "model.stem = 'patch'  # " in fields


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain/demo", "--help"], ["pretrain/demo", "run.seed=1", "-h"]])
def test_help_anywhere_prints_the_usage_of_a_stage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        open_run(Pretrain, arguments)
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: halfseen pretrain ")


def stored(schema, folder, **data):
    """A run folder that holds nothing but its config."""
    folder.mkdir(parents=True)
    config = schema()
    config.run.folder = str(folder)
    for name, value in data.items():
        setattr(config.data, name, value)
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


def failing(error):
    """A command that ends in an error."""

    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TooManyBad("3 of 20 samples are bad"), "3 of 20 samples are bad"),
        (capsule.NotFinite("see capsule.pt"), "see capsule.pt"),
        (StaleIndex("a.tar has changed"), "a.tar has changed"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), "[Errno 28] No space left on device: 'x.pt'"),
        (StaleIndex("Caught StaleIndex in worker 0.\nTraceback\nhalfseen.StaleIndex: a.tar: old"), "a.tar: old"),
    ],
)
def test_what_a_run_must_expect_is_one_line_and_exit_code_1(error, text, monkeypatch, capsys):
    monkeypatch.delenv("HALFSEEN_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as left:
        run_stage(failing(error), [])
    assert left.value.code == 1
    assert capsys.readouterr().err == f"error: {text}\n"
    monkeypatch.setenv("HALFSEEN_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_stage(failing(error), [])


def test_an_unexpected_exception_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_stage(failing(KeyError("bug")), [])


@pytest.mark.parametrize(("rank", "spoken"), [("0", True), ("3", False)])
def test_a_refusal_is_said_once_under_torchrun(rank, spoken, monkeypatch, capsys):
    for name, value in {"RANK": rank, "WORLD_SIZE": "4", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        run_stage(failing(ConfigError("a.b", 1, "is wrong", "use 2")), [])
    assert left.value.code == 2
    assert bool(capsys.readouterr().err) == spoken
