"""Every bundled recipe, as it is but for size and data: it loads, and it trains for a step."""

import pytest
import torch

from halfseen import teachers
from halfseen.classification import Classifier, Task
from halfseen.distributed import World
from halfseen.models import ViT
from halfseen.models.swin import Swin, SwinConfig
from halfseen.pretrain.distill import train
from halfseen.pretrain.distill.config import Distill
from halfseen.pretrain.distill.student import Distilled
from halfseen.recipes import load, recipes

RECIPES = [name for name, _ in recipes() if name.startswith("distill/")]
PUBLISHED = {
    "distill/deit_ti_distilled": 5_910_800,  # as timm's deit_*_distilled_patch16_224
    "distill/deit_s_distilled": 22_436_432,
    "distill/deit_b_distilled": 87_338_192,
    "distill/mini_deit_ti": 3_090_304,
    "distill/mini_deit_s": 11_450_824,
    "distill/mini_deit_b": 44_098_408,
    "distill/mini_swin_t": 12_001_765,
    "distill/mini_swin_s": 26_463_205,
    "distill/mini_swin_b": 46_444_852,
}
DATA = [
    *("data.train=embedded:emoji/train", "data.val=null", "data.label=folder", "data.classes=12", "data.workers=0"),
    *("run.global_batch=8", "run.images=8", "optim.warmup=0", "engine.device=cpu", "engine.name=single"),
    *("engine.precision=fp32", "teacher.precision=fp32", "teacher.weights=random", "teacher.classes=12"),
]
VIT = ["model.width=24", "model.depth=4", "model.heads=2", "model.patch=16", "data.image_size=32"]
SWIN = ["swin.width=8", "swin.heads=[1,1,2,2]", "swin.window=2", "data.image_size=64"]


def small_swin(cfg, image_size, key):
    """In place of timm's Swin-B: as many blocks."""
    made = Swin(SwinConfig(width=16, depths=[2, 2, 18, 2], heads=[1, 1, 2, 2], window=2), image_size)
    half = (0.5, 0.5, 0.5)
    return teachers.Source(Classifier(made, Task(pool="norm_mean"), cfg.classes), "small", (half, half), image_size, "")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_for_a_step(name, tmp_path, monkeypatch):
    swin = "swin" in name
    if swin:
        monkeypatch.setattr(teachers, "from_timm", small_swin)
    teacher = [] if swin else ["teacher.source=timm:test_vit"]
    config = load(Distill, name, [*DATA, *(SWIN if swin else VIT), *teacher])
    config.distillation.teacher_layers = [layer for layer in config.distillation.teacher_layers if swin or layer < 4]
    config.distillation.student_layers = [layer for layer in config.distillation.student_layers if swin or layer < 4]
    made = train.parts(config, World(), tmp_path)
    engine = made.engine(config, World(), fresh=True)
    scalars = engine.step([made.prepare(next(made.stream(0)))], made.schedule(config).rate(0), 0)
    assert all(value.isfinite() for value in scalars.values())
    assert scalars["grad_norm"] > 0


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_student_of_a_recipe_has_the_published_number_of_parameters(name):
    config = load(Distill, name)
    encoder = Swin(config.swin, 224) if config.trunk == "swin" else ViT(config.model, 224)
    with torch.no_grad():
        student = Distilled(encoder, config.task, config.data.classes, config.distillation)
    assert sum(parameter.numel() for parameter in student.parameters()) == PUBLISHED[name]
    assert config.data.classes == 1000


def test_every_recipe_is_counted_or_small():
    assert set(RECIPES) == {*PUBLISHED, "distill/demo"}


def test_mini_swin_leaves_position_tables_out_of_the_decay():
    config = load(Distill, "distill/mini_swin_t", [*DATA, *SWIN])
    encoder = Swin(config.swin, 64)
    groups = train.stage.optim.groups(Distilled(encoder, config.task, 12, config.distillation), config.optim)
    spared = {name for group in groups if not group.weight_decay for name in group.names}
    assert "encoder.layers.0.blocks.0.attn.relative_position_bias_table" in spared
    assert "encoder.layers.0.blocks.0.attn.proj_l.0.weight" not in spared
