"""Which mask, objective, target, stem and engine go together: every combination either trains or is refused.

docs/objectives.md is made from these tables (objective_table.py).
"""

from functools import cache

import pytest
import ranks
import torch
from safetensors.torch import save_file
from toys import NAMED

from halfseen import engine_config, engines, optim, recipes, stage
from halfseen.config import ConfigError, Model
from halfseen.data.hashing import uniform
from halfseen.distributed import World
from halfseen.models import ViT
from halfseen.pretrain import objectives, targets, train
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.tokenizers import Coder
from halfseen.pretrain.tokenizers.quantizer import QuantizerConfig
from halfseen.pretrain.train import Prepare, begin_with

SIDE, TOTAL = 32, 4
MASKS = ("random", "block", "block_v1", "coarse", "grid", "none")
STEMS = ("patch", "hmlp", "conv")
ENGINES = ("ddp", "fsdp", "zero2", "oss")

SMALL = (
    *("model.width=32", "model.depth=2", "model.heads=2", "model.patch=8", f"data.image_size={SIDE}"),
    *("mask.cell=16", "mask.min_block=2", "mask.ratio=0.5", "optim.base_lr=null", "optim.lr=1e-3"),
    *("augment.mean=[0.5,0.5,0.5]", "augment.std=[0.5,0.5,0.5]", "engine.device=cpu"),
)
DECODER = (
    "objective.mae.decoder_width=16",
    "objective.mae.decoder_depth=1",
    "objective.mae.decoder_heads=2",
)
TEACHER = (
    "target.features.teacher.source=timm:test_vit",
    "target.features.teacher.weights=random",
    "target.features.teacher.precision=fp32",
    "target.features.teacher.image_size=64",
)
TOKENIZER = (
    "objective.vqkd.decoder_width=16",
    "objective.vqkd.decoder_depth=1",
    "objective.vqkd.decoder_heads=2",
    "objective.vqkd.quantizer.codes=12",
    "objective.vqkd.quantizer.width=4",
    "objective.vqkd.quantizer.start_images=2",
)
DVAE = ("objective.dvae.codes=12", "objective.dvae.width=8", "objective.dvae.channels=8", "target.normalise=false")
# objective, target: further options.
STUDENTS = {
    ("mae", "pixels"): DECODER,
    ("mae", "codes"): DECODER,
    ("mae", "features"): (*DECODER, *TEACHER),
    ("mim", "pixels"): (),
    ("mim", "hog"): (),
    ("mim", "codes"): (),
    ("mim", "features"): TEACHER,
    ("beit2", "codes"): ("objective.beit2.early=1",),
    ("data2vec", "average"): ("target.average.layers=1", "engine.ema=0.9"),
    ("fd", "features"): TEACHER,
    ("vqkd", "features"): (*TOKENIZER, *TEACHER),
    ("dvae", "pixels"): DVAE,
}
PATCHWISE = ("patch", "hmlp")
EVEN = ("random", "block", "coarse", "grid")
# objective: masks and stems it trains with. Everything else must be refused.
LEGAL = {
    "mae": (EVEN, PATCHWISE),
    "mim": (MASKS, STEMS),
    "beit2": (MASKS[:-1], STEMS),
    "data2vec": (MASKS, STEMS),
    "fd": (("none",), STEMS),
    "vqkd": (("none",), STEMS),
    "dvae": (("none",), STEMS),  # it has no stem: the option is not read
}
# Noise is drawn on each rank, as dropout's, so a curve depends on their number.
NOISY = {"dvae"}
# Run under every engine: one of each kind of student.
SHARDED = (
    *(("mae", "pixels"), ("mim", "codes"), ("beit2", "codes"), ("data2vec", "average")),
    *(("fd", "features"), ("vqkd", "features"), ("dvae", "pixels")),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(3)
    trunk = ViT(Model(width=64, depth=1, heads=1, patch=8, key_bias=False), SIDE)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    save_file(Coder(trunk, QuantizerConfig(codes=12, width=4)).state_dict(), path)
    return str(path)


def config_of(objective, target, mask, stem, tokenizer):
    own = (f"objective.name={objective}", f"target.name={target}", f"mask.kind={mask}", f"model.stem={stem}")
    codes = (f"target.codes.tokenizer={tokenizer}",)
    return recipes.load(Pretrain, None, [*SMALL, *own, *codes, *STUDENTS[objective, target]])


def prepared(config, target):
    """Micro-batches as training prepares them, made from positions alone."""
    prepare = Prepare(config, target, torch.device("cpu"))

    def batch(positions):
        pixels = uniform(2, positions, 3 * SIDE * SIDE, "image").view(-1, 3, SIDE, SIDE)
        return prepare({"image": (255 * pixels).to(torch.uint8), "position": positions})

    return batch


def steps(world, config, engine="single", count=2):
    """Losses of a few steps."""
    stage.seed_weights(0)
    target = targets.create(config, world.device)
    student = objectives.create(config, target)
    batch = prepared(config, target)
    begin_with(student, lambda images: batch(torch.arange(images)), world)
    groups = optim.groups(student, config.optim)
    chosen = engine_config.Engine(**NAMED.get(engine, {"name": engine}), ema=config.engine.ema)
    made = engines.create(chosen, student, config.optim, groups, world, 0)
    losses = []
    for first in range(0, count * TOTAL, TOTAL):
        own = torch.arange(first + world.rank, first + TOTAL, world.world)
        losses.append(float(made.step([batch(part) for part in own.chunk(2)], 1e-3, first)["loss"]))
    return losses


def legal(objective, mask, stem):
    masks, stems = LEGAL[objective]
    return mask in masks and stem in stems


@pytest.mark.parametrize("student", STUDENTS, ids="-".join)
def test_every_mask_and_stem_trains_or_is_refused(student, tokenizer):
    for mask in MASKS:
        for stem in STEMS:
            if legal(student[0], mask, stem):
                config = config_of(*student, mask, stem, tokenizer)
                assert all(loss == loss for loss in steps(World(), config, count=1)), (mask, stem)
            else:
                with pytest.raises(ConfigError, match=r"^(mask|model)\."):
                    steps(World(), config_of(*student, mask, stem, tokenizer), count=1)


@pytest.mark.parametrize(
    ("objective", "target", "mask", "key"),
    [
        ("vqkd", "features", "mask.kind=random", "mask.kind"),
        ("fd", "features", "mask.kind=block", "mask.kind"),
        ("mae", "codes", "mask.kind=block_v1", "mask.kind"),
        ("beit2", "codes", "mask.kind=none", "mask.kind"),
        ("mim", "codes", "mask.count=10000", "mask.count"),
    ],
)
def test_a_mask_without_meaning_is_refused_before_anything_is_loaded(objective, target, mask, key, tmp_path):
    missing = ("target.features.teacher.source=no/such/run", "target.codes.tokenizer=no/such/run")
    names = (f"objective.name={objective}", f"target.name={target}", "data.train=embedded:emoji/train")
    config = recipes.load(Pretrain, None, [*SMALL, *names, *missing, mask])
    with pytest.raises(ConfigError) as refused:
        train.parts(config, World(), tmp_path)
    assert refused.value.key == key


def usual(objective):
    """The mask of an objective's published recipe, or one that shows more: uneven counts."""
    return {"mae": "random", "mim": "block_v1", "beit2": "block", "data2vec": "block"}.get(objective, "none")


def each(world, engine, tokenizer):
    return {
        student: steps(world, config_of(*student, usual(student[0]), "hmlp", tokenizer), engine) for student in SHARDED
    }


@cache
def alone(tokenizer):
    return each(World(), "single", tokenizer)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_objective_has_the_same_curve_under_every_engine(engine, tokenizer):
    for found in ranks.run(each, 2, engine, tokenizer):
        for student, losses in found.items():
            if student[0] in NOISY:
                assert all(loss == loss for loss in losses)
            else:
                assert losses == pytest.approx(alone(tokenizer)[student], rel=2e-5), student
