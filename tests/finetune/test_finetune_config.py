"""The fine-tuning schema: defaults are MAE's recipe, wrong options are refused with the fix."""

import pytest

from halfseen.config import ConfigError
from halfseen.finetune.config import Finetune
from halfseen.recipes import load, recipes, to_yaml


def test_defaults_are_the_published_recipe_of_vit_b():
    config = load(Finetune, None, ["data.classes=1000"])
    optim, augment = config.optim, config.augment
    assert (optim.base_lr, optim.layer_decay, optim.min_lr, optim.betas) == (5e-4, 0.65, 1e-6, (0.9, 0.999))
    assert (optim.warmup, config.run.images, optim.decay_tokens) == ("5ep", "100ep", False)
    assert (augment.mixup, augment.cutmix, augment.erase, augment.crop_scale) == (0.8, 1.0, 0.25, (0.08, 1.0))
    assert (config.task.pool, config.task.smoothing, config.task.head_std) == ("mean", 0.1, 2e-5)


def test_a_config_reads_back_equal(tmp_path):
    config = load(Finetune, None, ["data.classes=7", "task.pool=class", "task.mix_stride=24", "data.val=there"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(Finetune, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.classes=1"], ["data.classes", "1", "at least two"]),
        (["data.label=none"], ["data.label", "none"]),
        (["model.class_token=false", "task.pool=class"], ["task.pool", "task.pool=mean"]),
        (["task.loss=bce"], ["task.smoothing", "0.1", "task.smoothing=0"]),
        (["task.pool=max"], ["task.pool", "max", "mean"]),
        (["task.smoothing=1"], ["task.smoothing", "1"]),
        (["task.head_std=0"], ["task.head_std"]),
        (["data.repeats=3", "task.mix_stride=2"], ["task.mix_stride", "data.repeats=3"]),
        (["optim.layer_decay=2"], ["optim.layer_decay"]),
        (["objective.name=mae"], ["objective"]),
    ],
)
def test_refusals(overrides, words):
    with pytest.raises(ConfigError) as refusal:
        load(Finetune, None, ["data.classes=10", *overrides])
    for word in [*words, "fix:"]:
        assert word in str(refusal.value)


def test_every_bundled_fine_tuning_recipe_loads():
    names = [name for name, _ in recipes() if name.startswith("finetune/")]
    assert len(names) >= 4
    for name in names:
        assert load(Finetune, name).data.classes >= 2
