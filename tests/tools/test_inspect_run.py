"""The inspect command: what is in a run, and which file of it is bad."""

import shutil

import pytest
import torch

from halfseen.checkpoint import Checkpoints
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load, to_yaml
from halfseen.tools import inspect_run

STATE = {
    "model.encoder.blocks.0.w": torch.ones(3, 5),
    "model.encoder.blocks.1.w": torch.ones(3, 5),
    "model.head.w": torch.ones(7, dtype=torch.bfloat16),
    "model.token": torch.ones(2),
    "optim.head.w.exp_avg": torch.ones(7),
    "optim.token.exp_avg": torch.ones(2),
    "ema.head.w": torch.ones(7),
    "scaler.scale": torch.ones(()),
}


@pytest.fixture
def run(tmp_path):
    config = load(Pretrain, None, ["run.global_batch=64", "optim.clip=0.5"])
    meta = {"config": to_yaml(config), "engine": "single", "fingerprint": "f" * 64}
    store = Checkpoints(tmp_path / "run" / "checkpoints", 5, World())
    for position in (6400, 12800):
        store.save(position, STATE, meta)
    return tmp_path / "run"


def inspect(capsys, *arguments):
    code = inspect_run.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def damage(run, position):
    file = run / "checkpoints" / f"img_{position:012d}" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("inside", "asked"),
    [(".", "."), ("checkpoints", "."), ("checkpoints", "img_000000012800"), ("checkpoints/img_000000012800", ".")],
)
def test_the_place_may_be_named_from_within(run, capsys, monkeypatch, inside, asked):
    monkeypatch.chdir(run / inside)
    code, text = inspect(capsys, asked)
    assert code == 0
    assert "position    12,800 images" in text
    assert "img_000000012800  healthy" in text


def test_a_run_is_described_by_its_newest_checkpoint(run, capsys):
    code, text = inspect(capsys, run)
    assert code == 0
    assert "12,800 images = 200 steps of 64" in text
    assert "single on 1 ranks" in text
    assert f"torch {torch.__version__}" in text
    assert "  optim.clip = 0.5" in text
    assert "optim.eps" not in text  # a default
    assert text.count("  healthy") == 2
    row = next(line for line in text.splitlines() if "encoder.blocks.1" in line)
    assert [cell.strip() for cell in row.split("│")[2:7]] == ["15", "float32", "60", "0", "0"]
    total = next(line for line in text.splitlines() if "│ all" in line)
    assert [cell.strip() for cell in total.split("│")[2:7]] == ["39", "bfloat16 float32", "142", "36", "28"]
    row = next(line for line in text.splitlines() if "│ token" in line)
    assert [cell.strip() for cell in row.split("│")[2:7]] == ["2", "float32", "8", "8", "0"]


def test_every_tensor_can_be_listed(run, capsys):
    _, text = inspect(capsys, run, "--tensors")
    assert all(key in text for key in STATE)
    assert "[3, 5]" in text


def test_a_bad_file_is_named_and_the_one_before_is_described(run, capsys):
    damage(run, 12800)
    code, text = inspect(capsys, run)
    assert code == 0
    assert "6,400 images" in text
    assert "img_000000012800  damaged" in text
    assert "__0_0.distcp: its content has changed" in text


def test_without_a_healthy_one_the_code_is_one(run, capsys):
    damage(run, 6400)
    damage(run, 12800)
    code, text = inspect(capsys, run)
    assert code == 1
    assert "no checkpoint is healthy" in text
    code, text = inspect(capsys, run / "checkpoints" / "img_000000006400")
    assert code == 1


def test_one_checkpoint_is_described_even_if_an_older_one(run, capsys):
    code, text = inspect(capsys, run / "checkpoints" / "img_000000006400")
    assert code == 0
    assert "6,400 images" in text
    assert "img_000000012800" not in text


def test_leftovers_are_mentioned(run, capsys):
    (run / "checkpoints" / ".partial_img_000000019200").mkdir()
    assert "img_000000019200  unfinished" in inspect(capsys, run)[1]


def test_a_run_in_stages_is_described_by_its_last_stage(run, capsys):
    whole = run.parent / "whole"
    for stage in ("2_attention", "10_head"):  # as numbers, not as text
        shutil.copytree(run, whole / stage)
    shutil.rmtree(whole / "10_head" / "checkpoints" / "img_000000012800")
    (whole / "11_more").mkdir()
    code, text = inspect(capsys, whole)
    assert code == 0
    assert text.startswith("stage       10_head, the last with a checkpoint")
    assert "6,400 images = 100 steps" in text
    assert not inspect(capsys, whole / "2_attention")[1].startswith("stage ")


def test_a_config_of_another_version_is_no_obstacle(tmp_path, capsys):
    store = Checkpoints(tmp_path / "checkpoints", 5, World())
    store.save(0, STATE, {"config": "stage: pretrain\nmodel: {colour: red}\n"})
    code, text = inspect(capsys, tmp_path)
    assert code == 0
    assert "this version refuses it" in text
    assert "colour" in text


def test_what_holds_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        inspect_run.main([str(tmp_path)])
