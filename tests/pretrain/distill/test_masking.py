"""A student that predicts hidden patches (as MAE, BEiT, SimMIM) and learns from a teacher of the whole image."""

import json

import pytest
import torch

from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.finetune import evaluate
from halfseen.pretrain import mae
from halfseen.pretrain.distill import train
from halfseen.pretrain.distill.config import Distill
from halfseen.pretrain.mim import MIMConfig
from halfseen.pretrain.simmim import SimMIM
from halfseen.pretrain.train import main as pretrain
from halfseen.recipes import load

TINY = [
    *("model.width=32", "model.depth=4", "model.heads=2", "model.patch=8", "model.drop_path=0", "engine.device=cpu"),
    *("data.train=embedded:emoji/train", "data.val=null", "data.label=folder", "data.classes=12"),
    *("data.image_size=32", "data.workers=0", "data.repeats=1", "run.global_batch=24", "run.images=48"),
    *("run.log_every=24", "optim.warmup=0", "engine.ema=0", "task.mix_stride=4"),
    *("teacher.source=timm:test_vit", "teacher.weights=random", "teacher.classes=12", "teacher.precision=fp32"),
    *("model.distillation_token=false", "task.pool=norm_mean", "model.class_token=false"),
    *("distillation.scores=soft_ce", "distillation.share=1", "distillation.attention=1", "distillation.hidden=0.1"),
    *("distillation.student_layers=[1,3]", "distillation.teacher_layers=[2,5]", "distillation.relation_heads=4"),
]
HALF = [*TINY, "teacher.image_size=64", "mim.weight=0.5", "mim.mask.ratio=0.5"]
SIMMIM = [*HALF, "mim.mask.kind=coarse", "mim.mask.cell=16"]
MAE = [
    *(*HALF, "mim.form=mae", "mim.target.normalise=true", "mim.target.error=square"),
    *("mim.mae.decoder_width=16", "mim.mae.decoder_depth=1", "mim.mae.decoder_heads=2"),
]
TERMS = ("scores", "attention", "hidden", "mim")


def parts(folder, *overrides):
    return train.parts(load(Distill, None, overrides), World(), folder)


def first(made):
    return made.prepare(next(made.stream(0)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A discrete VAE of a step, 4 x 4 codes of an image of 32 pixels."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "dvae.yaml").write_text("")
    options = [
        *("data.train=embedded:emoji/train", "data.image_size=32", "data.workers=0", "model.patch=8"),
        *("objective.name=dvae", "mask.kind=none", "target.normalise=false", "engine.device=cpu"),
        *("objective.dvae.codes=16", "objective.dvae.channels=8", "objective.dvae.width=8"),
        *("run.global_batch=8", "run.images=8", "optim.warmup=0", "monitor.tensorboard=false"),
    ]
    assert pretrain([str(folder / "dvae.yaml"), *options, f"run.folder={folder / 'run'}"]) == 0
    return folder / "run"


def beit(tokenizer):
    codes = ["mim.target.name=codes", f"mim.target.codes.tokenizer={tokenizer}"]
    return [*HALF, "mim.mask.kind=block", "mim.mask.min_block=2", *codes]


@pytest.mark.parametrize("kind", ["simmim", "hog", "mae", "beit"])
def test_every_form_trains_all_that_trains_while_the_teacher_sees_the_whole_image(tmp_path, kind, request):
    options = {"simmim": SIMMIM, "hog": [*SIMMIM, "mim.target.name=hog"], "mae": MAE}.get(kind)
    made = parts(tmp_path, *(options or beit(request.getfixturevalue("tokenizer"))))
    batch = first(made)
    assert batch["mask"].sum(1).tolist() == [8] * 24
    plain = first(parts(tmp_path, *HALF, "mim.weight=0"))
    assert torch.equal(batch["image"], plain["image"])
    for name in ("teacher_qkv", "teacher_hidden"):
        assert all(torch.equal(a, b) for a, b in zip(batch[name], plain[name]))
    found = made.student(batch)
    torch.testing.assert_close(found["loss"], sum(found[f"loss_{term}"] for term in TERMS))
    assert made.student.terms == [f"loss_{term}" for term in TERMS]
    assert ("mim_accuracy" in found) == (kind == "beit")
    found["loss"].backward()
    still = [name for name, p in made.student.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert still == []
    assert made.student.train_flops_per_image() > 0


SWIN = [
    *(*SIMMIM, "trunk=swin", "swin.width=8", "swin.depths=[2,2]", "swin.heads=[1,2]", "swin.share=[2,2]"),
    *("swin.window=4", "swin.local_conv=true", "swin.drop_path=0", "distillation.attention=0", "distillation.hidden=0"),
    *("distillation.student_layers=[]", "distillation.teacher_layers=[]"),
]


@pytest.mark.parametrize("cell", [4, 8])
def test_a_swin_student_predicts_units_as_simmim_does(tmp_path, cell):
    """Of places of the last stage (8 pixels here), and finer; the loss is that of SimMIM's own student."""
    settings = [*SWIN, f"mim.mask.cell={cell}"]
    made = parts(tmp_path, *settings)
    student, batch = made.student.eval(), first(made)
    units = (32 // cell) ** 2
    assert batch["mask"].shape == (24, units)
    assert batch["mask"].sum(1).tolist() == [units // 2] * 24
    found = student(batch)
    torch.testing.assert_close(found["loss"], found["loss_scores"] + found["loss_mim"])
    part = student.hidden_patches
    alone = SimMIM(student.encoder, MIMConfig("trunk"), units // 2, part.target, cell)
    alone.mask_token, alone.head = part.mask_token, part.head
    expected = alone({"image": batch["image"], "mask": batch["mask"], "target": batch["hidden_target"]})["loss"]
    torch.testing.assert_close(found["loss_mim"], 0.5 * expected)
    found["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in part.parameters())
    assert student.train_flops_per_image() > 0


@pytest.mark.parametrize("options", [SIMMIM, MAE], ids=["simmim", "mae"])
def test_hidden_pixels_reach_the_loss_as_answers_only(tmp_path, options):
    made = parts(tmp_path, *options)
    batch = first(made)
    student = made.student.eval()
    cover = batch["mask"].view(24, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(cover, batch["image"] + 1.0, batch["image"])
    one, other = student(batch), student(batch | {"image": changed})
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_under_mae_relations_are_those_of_visible_patches(tmp_path):
    """What the teacher says of hidden patches changes no term; what it says of a visible one does."""
    made = parts(tmp_path, *MAE)
    batch = first(made)
    student = made.student.eval()

    def with_noise(where):
        return {"teacher_qkv": [tokens + where[..., None] * tokens.roll(1, 1) for tokens in batch["teacher_qkv"]]}

    one = student(batch)
    assert torch.equal(one["loss_attention"], student(batch | with_noise(batch["mask"]))["loss_attention"])
    assert not torch.equal(one["loss_attention"], student(batch | with_noise(~batch["mask"]))["loss_attention"])


def test_the_joint_losses_are_those_of_each_task_alone(tmp_path):
    """MAE's loss as its own student computes it; scores as those of the visible patches' mean."""
    made = parts(tmp_path, *MAE, "distillation.attention=0", "distillation.hidden=0")
    student, batch = made.student.eval(), first(made)
    alone = mae.MAE(student.encoder, load(Distill, None, MAE).mim.mae, 8, student.hidden_patches.target)
    alone.decoder.load_state_dict(student.hidden_patches.decoder.state_dict())
    found = student(batch)
    expected = alone({"image": batch["image"], "mask": batch["mask"], "target": batch["hidden_target"]})["loss"]
    torch.testing.assert_close(found["loss_mim"], 0.5 * expected)
    tokens = student.encoder(batch["image"], batch["mask"], 8)
    scores = student.head(tokens.mean(1))
    expected = torch.nn.functional.cross_entropy(scores, batch["teacher_logits"].softmax(1))
    torch.testing.assert_close(found["loss_scores"], expected)


def test_masks_are_functions_of_seed_and_position(tmp_path):
    made = parts(tmp_path, *HALF)
    later = made.prepare(next(made.stream(24)))["mask"]
    assert not torch.equal(first(made)["mask"], later)
    assert torch.equal(parts(tmp_path, *HALF).prepare(next(made.stream(24)))["mask"], later)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["mim.mask.kind=none"], "mim.mask.kind"),
        (["mim.mask.count=16"], "mim.mask.count"),
        (["mim.form=mae", "mim.mask.kind=block_v1"], "mim.mask.kind"),
        (["mim.target.name=average"], "mim.target.name"),
        (["mim.target.name=codes"], "mim.target.codes.tokenizer"),
        (["mim.mae.decoder_heads=3"], "mim.mae.decoder_heads"),
        (["model.stem=conv"], "mim.weight"),
        (["trunk=swin", "mim.form=mae"], "mim.form"),
    ],
)
def test_what_cannot_be_hidden_or_predicted_is_refused_by_its_key(tmp_path, overrides, key):
    with pytest.raises(ConfigError) as refused:
        parts(tmp_path, *HALF, *overrides)
    assert refused.value.key == key


def test_gradient_norms_of_the_terms_are_those_of_the_terms_and_change_nothing(tmp_path):
    settings = load(Distill, None, [*MAE, "engine.ema=0.9"])
    made = train.parts(settings, World(), tmp_path)
    engine = made.engine(settings, World(), fresh=True)
    before, batch = {key: value.clone() for key, value in engine.state().items()}, first(made)
    norms = engine.norms(batch, made.student.terms)
    assert all(torch.equal(value, before[key]) for key, value in engine.state().items())
    for term, norm in norms.items():
        made.student.zero_grad()
        made.student(batch)[term].backward()
        gradients = [p.grad.norm() for p in made.student.parameters() if p.grad is not None]
        torch.testing.assert_close(norm, torch.stack(gradients).norm())
    made.student.zero_grad()
    assert float(engine.step([batch], 1e-3, 0)["grad_norm"]) > 0


def test_a_joint_run_logs_shares_that_sum_to_one_and_leaves_a_classifier_to_evaluate(tmp_path):
    (tmp_path / "joint.yaml").write_text("stage: distill\n")
    options = [
        *("data.val=embedded:emoji/val", "distillation.gradients=true", "run.picture_every=24"),
        "run.evaluate_every=48",
        *("monitor.tensorboard=false", "run.async_save=false", f"run.folder={tmp_path / 'run'}"),
    ]
    assert train.main([str(tmp_path / "joint.yaml"), *MAE, *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "gradient/mim" in row]
    assert [row["position"] for row in measured] == [24, 48]
    for row in measured:
        assert sum(row[f"gradient_share/{term}"] for term in TERMS) == pytest.approx(1)
        assert all(row[f"gradient/{term}"] > 0 for term in TERMS)
    assert evaluate.main([str(tmp_path / "run"), f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    last = json.loads((tmp_path / "run/evaluation.json").read_text())["last"]
    assert found["val/loss"] == pytest.approx(last["val/loss"], rel=1e-5)
