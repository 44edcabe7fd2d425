"""A sequence of stages: each starts from the one before, is resumed where it stood, and trains what it began with."""

import json
import os
import signal
import time

import pytest
import ranks
import torch
from safetensors.torch import load_file

import halfseen
from halfseen import delta
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.finetune import evaluate, probe, stages, train
from halfseen.finetune.config import Finetune
from halfseen.recipes import load, to_yaml

RECIPE = """
model: {size: ti, width: 32, depth: 2, heads: 2, patch: 16}
data: {train: embedded:emoji/train, val: embedded:emoji/val, label: folder, classes: 12, image_size: 32, workers: 0,
  chunk: 8, window: 8}
augment: {randaugment: "", erase: 0, mixup: 0, cutmix: 0}
optim: {lr: 0.01, base_lr: null, warmup: 16}
engine: {device: cpu, ema: 0.9}
run: {global_batch: 16, images: 64, log_every: 16, evaluate_every: 32, checkpoint_every: 32}
monitor: {tensorboard: false}
stages:
  - {name: full}
  - {name: attention, init: ema, task: {train: attention}, data: {image_size: 48}, run: {images: 128}}
"""


def planned(text=RECIPE, overrides=(), own=(), folder="runs/x", tmp=None):
    recipe = tmp / "recipe.yaml"
    recipe.write_text(text)
    return stages.plan(load(Finetune, recipe, overrides), folder and tmp / folder, overrides, own)


def test_a_stage_takes_from_the_recipe_what_it_does_not_say(tmp_path):
    first, second = planned(tmp=tmp_path)
    assert (first.config.task.train, first.config.data.image_size, first.config.run.images) == ("all", 32, "64")
    assert (second.config.task.train, second.config.data.image_size, second.config.run.images) == (
        "attention",
        48,
        "128",
    )
    assert second.config.optim == first.config.optim
    assert not first.config.run.init
    assert (second.config.run.init, second.config.run.init_part) == (str(first.folder), "ema")
    assert [item.folder.name for item in (first, second)] == ["1_full", "2_attention"]
    for item in (first, second):
        (tmp_path / "again.yaml").write_text(to_yaml(item.config))
        assert load(Finetune, tmp_path / "again.yaml") == item.config, "a stage's folder holds an ordinary run"


def test_the_command_line_counts_for_all_stages_or_for_one(tmp_path):
    both = planned(overrides=["run.images=16", "optim.lr=0.5"], tmp=tmp_path)
    assert [item.config.run.images for item in both] == ["16", "16"]
    assert [item.config.data.image_size for item in both] == [32, 48]
    own = ["stages.attention.run.images=32", "stages.full.augment.crop_scale=[0.5,1.0]", "stages.full.data.val=null"]
    first, second = planned(own=own, tmp=tmp_path)
    assert (first.config.run.images, second.config.run.images) == ("64", "32")
    assert (first.config.augment.crop_scale, second.config.augment.crop_scale) == ((0.5, 1.0), (0.08, 1.0))
    assert first.config.data.val is None
    assert stages.split(["r.yaml", *own, "a.b=1"]) == (["r.yaml", "a.b=1"], own)


def test_the_best_of_a_stage_is_kept_where_the_next_one_wants_it(tmp_path):
    first, second = planned(RECIPE.replace("init: ema", "init: best"), tmp=tmp_path)
    assert first.config.task.keep_best
    assert not second.config.task.keep_best
    assert second.config.run.init == str(first.folder / "best.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("image_size: 48", "image_sise: 48"), r"stages\.attention: data\.image_sise(.|\n)*Did you mean: 'image_size'"),
        (("train: attention", "train: atention"), r"stages\.attention: task\.train='atention'"),
        (("image_size: 48", "image_size: 40"), r"stages\.attention: data\.image_size=40"),
        (("init: ema", "init: first"), r"stages\.attention\.init='first'(.|\n)*last, best, ema"),
        (("name: attention", "name: full"), "two stages have one name"),
        (("name: full", "name: a/b"), r"stages\[0\]\.name='a/b'"),
        (("{image_size: 48}, run: {", "{image_size: 48}, run: {folder: x, "), "a stage's folder is in the run's"),
        (("ema: 0.9}", "ema: 0}"), "keeps no averages to go on from"),
        (("init: ema, task", "init: ema, stages: [], task"), "cannot be said in a stage"),
    ],
)
def test_what_is_wrong_in_any_stage_is_refused_before_the_first(change, message, tmp_path):
    text = RECIPE.replace(*change)
    assert text != RECIPE
    with pytest.raises(ConfigError, match=message):
        planned(text, tmp=tmp_path)


def test_an_override_for_a_stage_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the stages are \['full', 'attention'\]"):
        planned(own=["stages.last.run.images=1"], tmp=tmp_path)


def start(recipe, folder):
    return train.main([str(recipe), f"run.folder={folder}"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The two stages, run without a stop."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert start(folder / "recipe.yaml", folder / "run") == 0
    return folder / "run"


def test_every_stage_leaves_a_run_an_artefact_and_a_line(whole):
    summary = json.loads((whole / "stages.json").read_text())
    assert {name: row["position"] for name, row in summary.items()} == {"full": 64, "attention": 128}
    rows = [json.loads(line) for line in (whole / "2_attention" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["position"] == 128
    artefact = whole / "2_attention" / "delta.safetensors"
    assert summary["attention"]["delta_bytes"] == artefact.stat().st_size
    assert not (whole / "1_full" / "delta.safetensors").exists(), "it started from nothing"
    trained = json.loads((whole / "2_attention" / "trained.json").read_text())
    assert set(load_file(artefact)) == set(trained["trained"]["names"])


def test_the_artefact_on_what_it_started_from_is_the_stage_to_the_bit(whole):
    """That is the first stage's averages, as the recipe says, and frozen tensors never moved."""
    base, result = read_weights(whole / "1_full", "ema"), read_weights(whole / "2_attention")
    back = delta.apply(base, whole / "2_attention" / "delta.safetensors")
    assert back.keys() == result.keys()
    assert all(torch.equal(back[name], result[name]) for name in result)
    frozen = json.loads((whole / "2_attention" / "trained.json").read_text())["frozen"]["names"]
    assert frozen
    assert all(torch.equal(base[name], result[name]) for name in frozen)


def test_a_finished_sequence_is_left_as_it_is(whole, capsys):
    before = (whole / "2_attention" / "metrics.jsonl").read_text()
    assert train.main([str(whole)]) == 0
    assert (whole / "2_attention" / "metrics.jsonl").read_text() == before
    assert "stage     2 of 2, attention: done" in capsys.readouterr().out


def test_the_last_stage_stands_for_the_whole_run(whole, tmp_path, capsys):
    """Evaluated, probed and loaded from the run's own folder."""
    assert evaluate.main([str(whole), "--json", str(tmp_path / "all.json")]) == 0
    assert evaluate.main([str(whole / "2_attention"), "--json", str(tmp_path / "last.json")]) == 0
    assert (tmp_path / "all.json").read_text() == (tmp_path / "last.json").read_text()
    assert probe.main(["knn", str(whole), "--k", "1", "probe.pool=mean"]) == 0
    model = halfseen.load(whole)
    assert model.image_size == (48, 48)
    assert torch.equal(model.classifier.head.weight, read_weights(whole / "2_attention")["head.weight"])


def test_a_stage_can_be_added(whole, tmp_path, capsys):
    more = "  - {name: head, task: {train: head}, data: {image_size: 48}, run: {images: 16}, optim: {warmup: 0}}\n"
    (tmp_path / "longer.yaml").write_text(RECIPE + more)
    assert start(tmp_path / "longer.yaml", whole) == 0
    assert "stage     2 of 3, attention: done" in capsys.readouterr().out
    assert list(json.loads((whole / "stages.json").read_text())) == ["full", "attention", "head"]
    assert len(load(Finetune, whole / "config.yaml").stages) == 3


def test_what_trains_cannot_change_in_a_stage_that_has_begun(whole):
    with pytest.raises(ConfigError, match=r"task\.train='mlp': the run in .*2_attention has 'attention'"):
        train.main([str(whole), "stages.attention.task.train=mlp"])


def test_a_run_killed_in_the_second_stage_goes_on_there_with_the_same_curve(whole, tmp_path):
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    child = ranks.begin(start, recipe, folder)
    deadline = time.monotonic() + 300
    while not list((folder / "2_attention" / "checkpoints").glob("img_*")):
        assert child.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (folder / "stages.json").read_text().count("attention"), "it must have been killed before the end"
    first = (folder / "1_full" / "metrics.jsonl").read_text()
    assert start(recipe, folder) == 0
    assert (folder / "1_full" / "metrics.jsonl").read_text() == first
    starts = json.loads((folder / "2_attention" / "receipt.json").read_text())["starts"]
    assert len(starts) == 2
    ours, theirs = read_weights(folder / "2_attention"), read_weights(whole / "2_attention")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
