"""The distillation stage: what enters the student, what is refused, what a run learns and leaves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfseen.checkpoint import read_weights
from halfseen.classification import Classifier
from halfseen.config import ConfigError
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.finetune import evaluate
from halfseen.models import ViT
from halfseen.models.swin import Swin
from halfseen.pretrain.distill import teacher, train
from halfseen.pretrain.distill.config import Distill
from halfseen.recipes import load
from halfseen.tools import export

TINY = [
    *("model.width=32", "model.depth=4", "model.heads=2", "model.patch=16", "model.drop_path=0", "engine.device=cpu"),
    *("data.train=embedded:emoji/train", "data.val=embedded:emoji/val", "data.label=folder", "data.classes=12"),
    *("data.image_size=32", "data.workers=0", "data.chunk=8", "data.window=8"),
    *("run.global_batch=24", "run.images=48", "run.log_every=24", "optim.warmup=24", "engine.ema=0"),
    *("run.evaluate_every=48", "run.checkpoint_every=48"),
    *("teacher.source=timm:test_vit", "teacher.weights=random", "teacher.classes=12"),
    "teacher.precision=fp32",
]
PLAIN = ["model.distillation_token=false", "task.pool=norm_mean", "model.class_token=false"]
RELATIONS = [
    *PLAIN,
    *("distillation.scores=soft_ce", "distillation.share=1", "distillation.attention=1", "distillation.hidden=0.1"),
    *("distillation.student_layers=[1,3]", "distillation.teacher_layers=[2,5]", "distillation.relation_heads=4"),
]


def config(*overrides):
    return load(Distill, None, [*TINY, *overrides])


def parts(tmp_path, *overrides):
    return train.parts(config(*overrides), World(), tmp_path)


def test_the_teacher_is_asked_about_the_very_images_the_student_gets(tmp_path):
    asked = []

    def ask(image, position, keys):
        asked.append(image.clone())
        return {"teacher_logits": torch.zeros(len(image), 12)}

    settings = config("augment.erase=1", "augment.mixup=0.8", "augment.cutmix=1")
    prepare = train.Prepare(settings, Batches(24, 1, 24, 1), torch.device("cpu"), ask)
    raw = next(parts(tmp_path).stream(0))
    prepared = prepare(raw)
    assert torch.equal(asked[0], prepared["image"])
    untouched = config("augment.erase=0", "augment.mixup=0", "augment.cutmix=0")
    plain = train.Prepare(untouched, Batches(24, 1, 24, 1), torch.device("cpu"), ask)(raw)
    assert not torch.equal(asked[0], plain["image"])
    assert prepared["teacher_logits"].shape == (24, 12)


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ([], {"labels", "scores"}),
        (["distillation.scores=hard"], {"labels", "scores"}),
        ([*PLAIN, "distillation.share=1"], {"scores"}),
        ([*PLAIN, "task.loss=bce", "task.smoothing=0", "distillation.scores=bce"], {"labels", "scores"}),
        (RELATIONS, {"scores", "attention", "hidden"}),
        ([*RELATIONS, "distillation.hidden_form=match"], {"scores", "attention", "hidden"}),
        ([*RELATIONS, "distillation.hidden_form=paper", "distillation.scores=none"], {"labels", "attention", "hidden"}),
        ([*RELATIONS, "model.share=2", "model.head_mixing=linear", "model.irpe=product"],
         {"scores", "attention", "hidden"}),
    ],
)  # fmt: skip
def test_every_term_is_returned_weighted_and_reaches_all_that_trains(tmp_path, overrides, terms):
    made = parts(tmp_path, *overrides)
    student = made.student
    found = student(made.prepare(next(made.stream(0))))
    assert {name.removeprefix("loss_") for name in found if name.startswith("loss_")} == terms
    torch.testing.assert_close(found["loss"], sum(found[f"loss_{term}"] for term in terms))
    found["loss"].backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_a_swin_student_learns_relations_from_a_swin_teacher(tmp_path, capsys):
    made = parts(
        tmp_path,
        *RELATIONS,
        *("trunk=swin", "swin.width=16", "swin.depths=[2,2]", "swin.heads=[1,2]", "swin.share=[2,2]"),
        *("swin.mix_heads=true", "swin.local_conv=true", "data.image_size=224", "run.global_batch=2", "data.repeats=1"),
        *("teacher.source=timm:swin_tiny_patch4_window7_224", "distillation.teacher_layers=[1,3]"),
        "distillation.relation_heads=1",
    )
    assert "block  1: 64 x 49 x 48  <-  teacher block  1: 64 x 49 x 288" in capsys.readouterr().out
    found = made.student(made.prepare(next(made.stream(0))))
    assert found["loss_attention"] > 0


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["distillation.share=1"], "distillation.share", "one head learns from labels"),
        ([*PLAIN, "distillation.share=0"], "distillation.share", "nothing is learned"),
        ([*RELATIONS, "distillation.student_layers=[3,1]"], "distillation.student_layers", "ascending"),
        ([*RELATIONS, "distillation.student_layers=[3]"], "distillation.student_layers", "paired"),
        ([*PLAIN, "distillation.attention=1"], "distillation.student_layers", "no blocks are named"),
        ([*RELATIONS, "distillation.relation_heads=5"], "distillation.relation_heads", "does not divide"),
        ([*RELATIONS, "distillation.teacher_layers=[2,6]"], "teacher.source", "6 self-attention blocks"),
        ([*RELATIONS, "model.patch=8"], "distillation.student_layers", "different sizes"),
        ([*RELATIONS, "distillation.student_layers=[1,4]"], "distillation.student_layers", "has 4 blocks"),
        (["teacher.classes=5"], "teacher.source", "5 classes"),
        (["data.label=none"], "data.label", "labels"),
        (["trunk=swin"], "task.pool", "no class token"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_first_step(tmp_path, overrides, key, words):
    with pytest.raises(ConfigError, match=words) as refused:
        parts(tmp_path, *overrides)
    assert refused.value.key == key


def test_another_grid_is_resampled_when_asked_for(tmp_path):
    made = parts(tmp_path, *RELATIONS, "model.patch=8", "distillation.resize=true")
    batch = made.prepare(next(made.stream(0)))
    assert [tuple(tokens.shape) for tokens in batch["teacher_qkv"]] == [(24, 16, 192)] * 2
    assert made.student(batch)["loss"].isfinite()


def test_a_smaller_view_for_the_teacher_gives_it_the_students_grid(tmp_path):
    made = parts(tmp_path, *RELATIONS, "teacher.image_size=64", "model.patch=8")
    assert [tokens.shape[1] for tokens in made.prepare(next(made.stream(0)))["teacher_hidden"]] == [16, 16]


def test_the_students_first_weights_do_not_depend_on_the_teacher(tmp_path):
    one = parts(tmp_path).student.state_dict()
    other = parts(tmp_path, "teacher.source=timm:test_vit2").student.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("distill") / "run"
    recipe = folder.parent / "tiny.yaml"
    recipe.write_text("")
    assert train.main([str(recipe), *TINY, f"run.folder={folder}", "engine.ema=0.9", "model.share=2"]) == 0
    return folder


def test_a_run_logs_its_terms_and_evaluates_both_heads_together(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss_scores" in row]
    assert len(logged) == 2
    assert all(row["loss"] == pytest.approx(row["loss_scores"] + row["loss_labels"], rel=1e-5) for row in logged)
    assert all(0 <= row["agreement"] <= 1 for row in logged)
    evaluated = json.loads((finished / "evaluation.json").read_text())["last"]
    assert "val_ema/top1" in evaluated
    assert {"head.weight", "head_dist.weight", "encoder.dist_token"} <= set(read_weights(finished))


def test_an_exported_trunk_keeps_its_weights_shared_on_disk(finished, tmp_path):
    """About half the size of the untied trunk, and all that the deploy model needs."""
    assert export.main([str(finished), str(tmp_path / "trunk.safetensors")]) == 0
    weights = load_file(tmp_path / "trunk.safetensors")
    trunk = ViT(config("model.share=2").model, 32)
    trunk.load_state_dict(weights)
    untied = sum(value.numel() * 4 for value in ViT(config().model, 32).state_dict().values())
    blocks = sum(value.numel() * 4 for value in trunk.blocks.state_dict().values())
    assert (tmp_path / "trunk.safetensors").stat().st_size < untied - 0.8 * blocks


def test_the_deploy_model_is_a_plain_classifier_with_the_same_weights(finished):
    settings = load(Distill, finished / "config.yaml")
    plain = Classifier(ViT(settings.model, 32), settings.task, 12)
    plain.load_state_dict(read_weights(finished))
    student, _ = train.create_student(settings, None, {}, World(rank=1))
    student.load_state_dict(read_weights(finished))
    batch = {"image": torch.randn(2, 3, 32, 32), "task": "predict"}
    with torch.no_grad():
        assert torch.equal(plain.eval()(batch)["logits"], student.eval()(batch)["logits"])


@pytest.mark.parametrize(("option", "prefix"), [([], "val"), (["--ema"], "val_ema")])
def test_the_evaluate_command_finds_what_the_run_found(finished, tmp_path, option, prefix):
    assert evaluate.main([str(finished), *option, f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    last = json.loads((finished / "evaluation.json").read_text())["last"]
    assert found["val/top1"] == last[f"{prefix}/top1"]
    assert found["val/loss"] == pytest.approx(last[f"{prefix}/loss"], rel=1e-5)


def test_a_swin_student_is_evaluated_and_exported_like_any_other(tmp_path):
    """Shared blocks and a convolution in each: what `halfseen evaluate` finds is what the run found."""
    (tmp_path / "swin.yaml").write_text("")
    swin = [
        *("trunk=swin", "swin.width=8", "swin.depths=[2,2]", "swin.heads=[1,2]", "swin.share=[2,2]", "swin.window=4"),
        *("swin.mix_heads=true", "swin.local_conv=true", "swin.drop_path=0", "task.pool=norm_mean"),
        *("model.distillation_token=false", "distillation.scores=soft_ce", f"run.folder={tmp_path / 'run'}"),
    ]
    assert train.main([str(tmp_path / "swin.yaml"), *TINY, *swin]) == 0
    assert evaluate.main([str(tmp_path / "run"), f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    last = json.loads((tmp_path / "run" / "evaluation.json").read_text())["last"]
    assert found["val/top1"] == last["val/top1"]
    assert found["val/loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "trunk.safetensors")]) == 0
    trunk = Swin(load(Distill, tmp_path / "run" / "config.yaml").swin, 32)
    trunk.load_state_dict(load_file(tmp_path / "trunk.safetensors"))
    assert len(trunk.blocks) == 2


def test_a_distilled_run_can_teach(finished, tmp_path, capsys):
    other = [option for option in TINY if not option.startswith("teacher.")]
    settings = load(Distill, None, [*other, f"teacher.source={finished}", "teacher.part=ema"])
    made = train.parts(settings, World(), tmp_path)
    assert "12 classes" in capsys.readouterr().out
    assert made.prepare(next(made.stream(0)))["teacher_logits"].shape == (24, 12)


def test_an_interrupted_run_continues_on_the_same_curve(finished, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("")
    options = [
        *TINY,
        f"run.folder={tmp_path / 'run'}",
        "engine.ema=0.9",
        "model.share=2",
        "run.checkpoint_every=24",
        "data.val=null",
    ]
    assert train.main([str(recipe), *options]) == 0
    newest = sorted((tmp_path / "run/checkpoints").glob("img_*"))[-1]
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    newest.rmdir()
    assert train.main([str(tmp_path / "run")]) == 0
    first, second = read_weights(finished), read_weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_time_the_teacher_takes_is_logged_once_it_is_known(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, second = (row for row in rows if "loss_scores" in row)
    assert (first["teacher_ms"], first["teacher_share"]) == (0, 0)
    assert second["teacher_ms"] > 0
    assert 0 < second["teacher_share"] < 1


def test_the_teachers_share_is_of_the_time_from_question_to_question(monkeypatch):
    """Three questions in each step of 10 s, each answered in 1 s: 30 %, whatever their rhythm."""
    clock = iter([0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 10.0, 11.0, 11.0, 12.0, 12.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(teacher.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(teacher, "FADING", 1.0)
    timed = teacher.Timed(lambda image, position, keys: {"teacher_logits": image}, torch.device("cpu"))
    found = [timed(torch.zeros(1), torch.zeros(1), []) for _ in range(7)]
    assert found[-1]["teacher_ms"] == 1000
    assert found[-1]["teacher_share"] == pytest.approx(0.3)
