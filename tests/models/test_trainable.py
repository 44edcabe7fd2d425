"""What a trunk cannot do is refused by the config alone, in every stage that trains one: no rank waits to hear it."""

import pytest
import torch

from halfseen.config import ConfigError
from halfseen.finetune.config import Finetune
from halfseen.models import ViT
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.distill.config import Distill
from halfseen.recipes import load

ILLEGAL = [
    (["model.share=3", "model.parallel=2"], "model.share"),
    (["model.peg=13"], "model.peg"),
    (["model.attention=convolutional"], "model.class_token"),
    (["data.image_size=230"], "data.image_size"),
    (["model.width=100", "model.heads=7"], "model.heads"),
    (["model.norm=power", "engine.recompute=true"], "engine.recompute"),
    (["model.attention=reattention", "engine.recompute=true"], "engine.recompute"),
]
VISIBLE_ONLY = ["model.stem=conv", "model.attention=reattention", "model.norm=power", "model.peg=1"]


@pytest.fixture(autouse=True)
def _nothing_is_made(monkeypatch):
    """Neither a tensor nor a group of ranks."""

    def made(*arguments, **options):
        raise AssertionError("something was made")

    monkeypatch.setattr(ViT, "__init__", made)
    monkeypatch.setattr(torch.distributed, "init_process_group", made)


LABELS = ["data.label=cls", "data.classes=10"]
STAGES = {
    Pretrain: ["objective.name=mim"],
    Finetune: [*LABELS, "task.pool=mean"],
    Distill: [*LABELS, "model.distillation_token=false", "task.pool=norm_mean"],
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("options", "key"), ILLEGAL)
def test_parts_that_cannot_stand_together(stage, options, key):
    load(stage, None, STAGES[stage])
    with pytest.raises(ConfigError) as error:
        load(stage, None, [*STAGES[stage], *options])
    assert error.value.key == key
    assert error.value.fix


@pytest.mark.parametrize("option", VISIBLE_ONLY)
def test_an_encoder_of_visible_patches(option):
    load(Pretrain, None, ["objective.name=mim", option])
    with pytest.raises(ConfigError) as error:
        load(Pretrain, None, ["objective.name=mae", option])
    assert error.value.key == option.partition("=")[0]


def test_an_encoder_of_visible_patches_that_is_distilled():
    mixed = [*STAGES[Distill], "mim.weight=1", "model.peg=1"]
    load(Distill, None, [*mixed, "mim.form=mim"])
    with pytest.raises(ConfigError, match=r"model\.peg"):
        load(Distill, None, [*mixed, "mim.form=mae"])
