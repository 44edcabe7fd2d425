"""The probe beside a pretraining: it tells something, and the run does not notice it."""

import json

import pytest
import torch

from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.pretrain.train import main

RUN = [
    *("model.width=32", "model.depth=2", "model.heads=2", "model.patch=16", "engine.device=cpu", "data.image_size=32"),
    *("data.train=embedded:emoji/train", "data.workers=0", "monitor.tensorboard=false", "model.drop_path=0.2"),
    *("run.global_batch=32", "run.images=128", "run.log_every=32", "run.checkpoint_every=64", "optim.warmup=32"),
    *("run.picture_every=0", "run.evaluate_every=64"),
]
MAE = ["objective.mae.decoder_width=16", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2"]
MIM = ["objective.name=mim", "model.position=learned"]
PROBED = ["online.k=5", "online.bank=200", "data.label=folder", "data.classes=12", "data.val=embedded:emoji/val"]


def curve(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], [row["probe/knn"] for row in rows if "probe/knn" in row]


@pytest.mark.parametrize("objective", [MAE, MIM], ids=["mae", "mim"])
def test_the_run_is_the_same_to_the_bit_with_and_without_it(tmp_path, objective, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("")
    for name, more in (("plain", []), ("probed", PROBED)):
        assert main([str(recipe), *RUN, *objective, *more, f"run.folder={tmp_path / name}"]) == 0
    (plain, none), (losses, shares) = curve(tmp_path / "plain"), curve(tmp_path / "probed")
    assert plain == losses
    assert len(losses) == 4
    assert not none
    assert len(shares) == 2
    assert all(1 / 12 < share < 1 for share in shares), "better than chance"
    ours, theirs = read_weights(tmp_path / "plain"), read_weights(tmp_path / "probed")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "5 nearest of" in capsys.readouterr().out


@pytest.mark.parametrize("lacking", ["data.label=none", "data.classes=0", "data.val=null", "online.pool=class"])
def test_what_it_needs_is_asked_for(tmp_path, lacking):
    (tmp_path / "recipe.yaml").write_text("")
    options = [*RUN, *MAE, *PROBED, "model.class_token=false", lacking, f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"online\.(k|pool)"):
        main([str(tmp_path / "recipe.yaml"), *options])
