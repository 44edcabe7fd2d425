"""Every step's tensors are on one device, and the host never waits for it: each kind of student, prepared and trained.

No GPU is needed: see elsewhere.py.
"""

import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from safetensors.torch import save_file
from small_trunks import FAMILIES
from torchvision.io import encode_png

from halfseen.config import Model
from halfseen.data.writer import ShardWriter
from halfseen.distributed import World
from halfseen.finetune import probe, segment
from halfseen.finetune import train as finetune
from halfseen.finetune.config import Finetune
from halfseen.finetune.probe_config import Probe
from halfseen.finetune.segment_config import Segment
from halfseen.models import ViT
from halfseen.pretrain import train as pretrain
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.distill import train as distill
from halfseen.pretrain.distill.config import Distill
from halfseen.pretrain.tokenizers import Coder
from halfseen.pretrain.tokenizers.quantizer import QuantizerConfig
from halfseen.recipes import load

COMMON = (
    *("data.train=embedded:emoji/train", "data.image_size=32", "data.workers=0", "engine.precision=fp32"),
    *("run.global_batch=4", "run.images=8", "optim.warmup=0", "optim.name=lars", "optim.clip=1", "engine.ema=0.9"),
)
SMALL = ("model.width=32", "model.depth=2", "model.heads=2", "model.patch=8", "model.drop_path=0.3")
LABELLED = ("data.label=folder", "data.classes=12", "data.val=null", "task.mix_stride=2", "data.repeats=1")


def watched(stage, schema, options, folder):
    """A stage's parts on the device, a prepared batch of it, and what is seen from then on."""
    config = load(schema, None, [*COMMON, *options])
    with Elsewhere() as seen:
        made = stage.parts(config, World(device=DEVICE), folder)
    raw = next(made.stream(0))
    with seen:
        batch = made.prepare(raw)  # constants reach the device once
        seen.waits.clear()
        batch = made.prepare(raw)
    return config, made, batch, seen


def forward_and_backward(*arguments):
    """Prepare and learn from a batch, then predict from it."""
    _, made, batch, seen = watched(*arguments)
    with seen:
        made.student.to(DEVICE)
        seen.waits.clear()
        scalars = made.student(batch)
        scalars["loss"].backward()
        answer = made.student.eval()(batch | {"task": "predict"})
    gradients = {name: p.grad for name, p in made.student.named_parameters() if p.grad is not None}
    everywhere(scalars | answer | gradients)
    assert gradients
    assert seen.waits == []
    assert seen.unfused == []


def everywhere(tensors):
    assert [name for name, value in tensors.items() if value.device != DEVICE] == []


def whole_step(*arguments):
    """The same in an engine, with the update, averages and checks."""
    config, made, batch, seen = watched(*arguments)
    with seen:
        engine = made.engine(config, World(device=DEVICE), fresh=True)
        seen.waits.clear()
        scalars = engine.step([batch, batch], 1e-3, 0)
        assert seen.waits == []
        everywhere(scalars | engine.state() | engine.predict(batch))


# ---------------------------------------------------------------------------------------------------- pretraining

DECODER = ("objective.mae.decoder_width=16", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2")
TEACHER = [f"target.features.teacher.{x}" for x in ("source=timm:test_vit", "weights=random", "image_size=64")]
TOKENIZER = (
    *("objective.vqkd.decoder_width=16", "objective.vqkd.decoder_depth=1", "objective.vqkd.decoder_heads=2"),
    *("objective.vqkd.quantizer.codes=12", "objective.vqkd.quantizer.width=4"),
    *("objective.vqkd.quantizer.start_images=2", "objective.vqkd.quantizer.revive=2"),
)
OBJECTIVES = {
    "mae": ("mask.kind=random", "objective.name=mae", "target.name=pixels", *DECODER, "model.drop_path=0"),
    "mae, hmlp": ("mask.kind=grid", "mask.cell=16", "objective.name=mae", "model.stem=hmlp", *DECODER),
    "simmim": ("mask.kind=coarse", "mask.cell=16", "objective.name=mim", "target.error=absolute"),
    "maskfeat": ("mask.kind=block", "mask.min_block=2", "objective.name=mim", "target.name=hog"),
    "beit": ("mask.kind=block_v1", "mask.min_block=2", "objective.name=mim", "target.name=codes"),
    "beit2": ("mask.kind=block", "mask.min_block=2", "objective.name=beit2", "objective.beit2.early=1"),
    "data2vec": ("mask.kind=random", "objective.name=data2vec", "target.name=average", "target.average.layers=1"),
    "fd": ("mask.kind=none", "objective.name=fd", "target.name=features", *TEACHER),
    "vqkd": ("mask.kind=none", "objective.name=vqkd", "target.name=features", *TEACHER, *TOKENIZER),
    "dvae": ("mask.kind=none", "objective.name=dvae", "target.normalise=false", "objective.dvae.codes=12"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    trunk = ViT(Model(width=64, depth=1, heads=1, patch=8, key_bias=False), 32)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    save_file(Coder(trunk, QuantizerConfig(codes=12, width=4)).state_dict(), path)
    return f"target.codes.tokenizer={path}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective(name, tokenizer, tmp_path):
    codes = ("target.name=codes", tokenizer) if name.startswith("beit") else ()
    train = whole_step if name in ("mae", "data2vec", "vqkd") else forward_and_backward
    train(pretrain, Pretrain, [*SMALL, *OBJECTIVES[name], *codes], tmp_path)


# ---------------------------------------------------------------------------------------------------------- trunks

PARTS = {
    "relative bias": ("model.relative=block", "model.layer_scale=0.1"),
    "shared bias, visible": ("model.relative=shared", "objective.name=mae", *DECODER),
    "irpe": ("model.irpe=product", "model.irpe_on=qkv"),
    "irpe cross": ("model.irpe=cross", "model.irpe_mode=bias", "model.irpe_on=k"),
    "rope": ("model.rope=true",),
    "peg": ("model.peg=1",),
    "re-attention": ("model.attention=reattention",),
    "power norm": ("model.norm=power",),
    "parallel, registers": ("model.parallel=2", "model.registers=2"),
    "shared blocks": ("model.share=2", "model.head_mixing=affine"),
    "post norm": ("model.norm_place=post", "model.mlp=swiglu"),
    "conv stem": ("model.stem=conv", "model.stem_norm=batch"),
    "convolutional": ("model.attention=convolutional", "model.class_token=false"),
    "swin": (
        *("trunk=swin", "data.image_size=64", "swin.width=16", "swin.depths=[1,2]", "swin.heads=[1,2]"),
        *("swin.window=4", "swin.drop_path=0.3"),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_trunk(name, tmp_path):
    fixed = ("objective.name=mim", "mask.kind=random", "mask.cell=8")
    forward_and_backward(pretrain, Pretrain, [*SMALL, *fixed, *PARTS[name]], tmp_path)


@pytest.mark.parametrize("name", ["swin", "nest", "pvt_v2", "twins_svt", "tnt"])
def test_a_hierarchical_trunk(name, tmp_path):
    model, _, options = FAMILIES[name]
    trunk = ("trunk=timm", f"timm.name={model}", f"timm.options={options}")
    forward_and_backward(finetune, Finetune, [*LABELLED, *trunk, "data.image_size=64", "task.pool=norm_mean"], tmp_path)


# ------------------------------------------------------------------------------------------- stages with labels

TUNINGS = {
    "full": ("optim.name=lamb", "augment.mixup=0.8", "augment.cutmix=1", "augment.erase=1"),
    "attention": ("task.train=attention", "task.recompute_mlp=true"),
    "lora": ("task.train=lora", "task.loss=bce", "task.smoothing=0"),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_fine_tuning(name, tmp_path):
    (whole_step if name == "full" else forward_and_backward)(
        finetune, Finetune, [*SMALL, *LABELLED, *TUNINGS[name]], tmp_path
    )


PLAIN = ("model.distillation_token=false", "task.pool=norm_mean", "model.class_token=false")
RELATIONS = (
    *(*PLAIN, "distillation.share=1", "distillation.attention=1", "distillation.hidden=0.1"),
    *("distillation.student_layers=[0,1]", "distillation.teacher_layers=[2,5]", "distillation.relation_heads=4"),
)
DISTILLATIONS = {
    "hard": ("distillation.scores=hard",),
    "soft, relations": (*RELATIONS, "distillation.scores=soft_ce"),
    "bce, matched, resized": (
        *(*RELATIONS, "distillation.scores=bce", "distillation.hidden_form=match"),
        *("distillation.resize=true", "teacher.image_size=32"),
    ),
    "paper": (*RELATIONS, "distillation.scores=soft", "distillation.hidden_form=paper"),
    "beside simmim": (*RELATIONS, "mim.weight=0.5", "mim.mask.kind=coarse", "mim.mask.cell=16"),
    "beside mae": (*RELATIONS, "mim.weight=0.5", "mim.form=mae", *(f"mim.{x[10:]}" for x in DECODER)),
}


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_distillation(name, tmp_path):
    teacher = ("teacher.source=timm:test_vit", "teacher.weights=random", "teacher.classes=12", "teacher.image_size=64")
    forward_and_backward(
        distill, Distill, [*SMALL, "model.drop_path=0", *LABELLED, *teacher, *DISTILLATIONS[name]], tmp_path
    )


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe(kind, tmp_path):
    options = (f"probe.kind={kind}", "probe.rates=[1,2]", "probe.heads=4", "model.drop_path=0")
    forward_and_backward(probe, Probe, [*SMALL, *LABELLED[:3], *options], tmp_path)


def test_segmentation(tmp_path):
    with ShardWriter(tmp_path / "pairs.tar") as shard:
        for number in range(8):
            pair = {
                "png": torch.zeros(3, 40, 40, dtype=torch.uint8),
                "seg.png": torch.ones(1, 40, 40, dtype=torch.uint8),
            }
            shard.write(f"k{number}", {name: encode_png(part).numpy().tobytes() for name, part in pair.items()})
    options = (f"data.train={tmp_path / 'pairs.tar'}", "data.classes=3", "model.depth=4", "pixels.width=16")
    forward_and_backward(segment, Segment, [*SMALL, *options], tmp_path)


# ------------------------------------------------------------------------------------------------------ the watch


def test_what_is_watched_for_is_seen():
    there = torch.zeros(3)
    with Elsewhere() as seen:
        here = there.to(DEVICE, non_blocking=True)
        assert seen.waits == []
        torch.tensor([1.0], device=DEVICE)
        here[torch.tensor([0, 1])]
        here.copy_(there)
        here.cpu()
        assert [wait.partition(" at ")[0] for wait in seen.waits] == [
            "a copy from pageable memory",
            "an index of the host",
            "a copy between host and device",
            "a copy to the host",
        ]
        for refused in (lambda: here + there, lambda: here.sum().item(), lambda: here[here > 0], lambda: bool(here[0])):
            with pytest.raises(Exception, match=r"device|data-dependent|dynamic|DataDependent|nonzero|scalar"):
                refused()
        query = torch.zeros(1, 2, 3, 8, device=DEVICE)
        torch.nn.functional.scaled_dot_product_attention(query, query, query, here.new_zeros(3, 3).t())
        assert len(seen.unfused) == 1
