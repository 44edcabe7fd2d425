"""The command line: every command exists, wrong ones are explained."""

import errno
import importlib
import subprocess
import sys

import pytest

from halfseen import capsule
from halfseen.cli import COMMANDS, GROUPS, run_stage
from halfseen.config import ConfigError
from halfseen.data.ledger import TooManyBad
from halfseen.data.reader import StaleIndex
from halfseen.recipes import find_recipe


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "halfseen", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_main(name):
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


def test_help_lists_every_command():
    result = command("--help")
    assert result.returncode == 0
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_a_typo_is_answered_with_the_near_command():
    result = command("pretrian")
    assert result.returncode == 2
    assert "Did you mean 'pretrain'" in result.stderr
    assert len(result.stderr.splitlines()) == 2, "the answer must not be lost above a list of commands"


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


def test_a_ctrl_c_is_one_line_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as left:
        run_stage(failing(KeyboardInterrupt()), [])
    assert left.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("demo", "try distill/demo, finetune/demo, pretrain/demo;"),
        ("pretrain/mae_b", "try pretrain/mae_b16,"),
        ("nothing like it", "`halfseen recipes` lists them"),
    ],
)
def test_a_recipe_that_is_not_there_is_answered_with_near_ones(name, fix):
    with pytest.raises(ConfigError) as refused:
        find_recipe(name)
    assert refused.value.fix.startswith(fix)
    assert len(refused.value.fix) < 120
