"""What a step keeps of its images is counted, and agrees with the published formula and with what autograd keeps."""

import importlib
from dataclasses import replace

import pytest
import torch

from halfseen.cli import COMMANDS
from halfseen.distributed import World
from halfseen.launch import command, memory
from halfseen.recipes import load

SMALL = ["model.width=64", "model.depth=4", "model.heads=2", "model.mlp_ratio=4", "data.workers=0"]
DECODER = ["objective.mae.decoder_width=32", "objective.mae.decoder_depth=2", "objective.mae.decoder_heads=2"]
PRETRAIN = ["pretrain/demo", *SMALL, *DECODER]
MIM = [*PRETRAIN, "objective.name=mim", "model.stem=patch", "target.name=pixels"]
FINETUNE = ["finetune/demo", *SMALL, "task.train=all", "model.drop_path=0"]


def stage_of(stage, recipe, *options):
    module = importlib.import_module(COMMANDS[stage][0])
    return module, load(module.SCHEMA, recipe, options)


def counted(tmp_path, stage, *options):
    """The stage's config, and what is counted for it."""
    module, config = stage_of(stage, *options)
    return config, memory.count(module, config, tmp_path)


def measured(tmp_path, images, dtype, stage, *options):
    """Bytes that a real forward of so many images keeps, and the student."""
    module, config = stage_of(stage, *options)
    config.run.global_batch, config.data.workers = images, 0
    config.augment.mixup = config.augment.cutmix = 0.0
    parts = module.parts(config, World(), tmp_path)
    batch = parts.prepare(next(parts.stream(0)))
    with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
        found = memory.kept(parts.student, batch)
    return images * (found.outside + sum(found.inside)), parts.student


def tokens(config):
    return (config.data.image_size // config.model.patch) ** 2 + int(config.model.class_token)


@pytest.mark.parametrize(("stage", "options"), [("pretrain", MIM), ("finetune", FINETUNE)])
def test_a_block_keeps_sixteen_numbers_of_each_token_and_channel(stage, options, tmp_path):
    """Korthikanti et al. (2022), without dropout and with fused attention."""
    config, found = counted(tmp_path, stage, *options)
    formula = 16 * 4 * tokens(config) * 64 * 4
    assert sum(found.inside) == pytest.approx(formula, rel=0.1)
    assert len(found.inside) == 4


def test_an_encoder_of_visible_patches_keeps_those(tmp_path):
    config, found = counted(tmp_path, "pretrain", *PRETRAIN)
    visible = tokens(config) - int((tokens(config) - 1) * config.mask.ratio)
    formula = 16 * 4 * (visible * 64 * 4 + tokens(config) * 32 * 2)
    assert sum(found.inside) == pytest.approx(formula, rel=0.2)  # the decoder's last block asks hidden patches alone


@pytest.mark.parametrize(("stage", "options"), [("pretrain", PRETRAIN), ("pretrain", MIM), ("finetune", FINETUNE)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_what_a_larger_batch_keeps(stage, options, precision, tmp_path):
    """Within a fifth. On the CPU attention keeps its scores in bf16, and few tokens have few of them."""
    config, found = counted(tmp_path, stage, *options)
    config.engine.precision = precision
    dtype = torch.bfloat16 if precision == "bf16" else None
    expected, student = measured(tmp_path, 12, dtype, stage, *options)
    estimate = 12 * found.per_image(config.engine) + memory.casts(student, config.engine)
    assert estimate == pytest.approx(expected, rel=0.2)


def test_recomputation_keeps_the_blocks_inputs_and_one_block(tmp_path):
    config, found = counted(tmp_path, "finetune", *FINETUNE)
    inputs = 4 * tokens(config) * 64
    assert found.inputs == [inputs] * 4
    recomputing = replace(config.engine, recompute=True)
    assert found.per_image(recomputing) == found.outside + max(found.inside) + 4 * inputs
    assert found.per_image(replace(recomputing, offload_activations=True)) == found.outside + max(found.inside)
    assert found.per_image(replace(recomputing, precision="bf16")) < found.per_image(recomputing)


def test_what_is_frozen_keeps_less(tmp_path):
    _, whole = counted(tmp_path, "finetune", *FINETUNE)
    _, attention = counted(tmp_path, "finetune", *FINETUNE, "task.train=attention")
    _, head = counted(tmp_path, "finetune", *FINETUNE, "task.train=head")
    assert sum(attention.inside) < 0.8 * sum(whole.inside)
    assert sum(head.inside) == 0


def test_a_teacher_takes_memory_beside_the_student(tmp_path):
    module, config = stage_of("pretrain", *MIM)
    parts = module.parts(config, World(), tmp_path)
    assert memory.beside(parts.prepare, parts.student) == 0
    teacher = torch.nn.Linear(10, 10, bias=False).requires_grad_(False)
    parts.prepare.target.teacher = teacher
    assert memory.beside(parts.prepare, parts.student) == 400


def dry_run(tmp_path, *options):
    given = [*FINETUNE, f"run.folder={tmp_path / 'run'}", "run.global_batch=64", *options]
    return command.main(["finetune", *given, "--launch", "launch/local", "--dry-run"])


def test_activations_beyond_the_stated_memory_are_warned_of_with_a_batch_that_fits(tmp_path, capsys):
    assert dry_run(tmp_path, "launch.gpu_memory_gib=10") == 0
    said = capsys.readouterr().out
    assert "for each of 32 images at once" in said
    assert "of 10 GiB" in said
    assert "warning" not in said
    assert dry_run(tmp_path, "launch.gpu_memory_gib=0.01") == 0
    said = capsys.readouterr().out
    assert "warning   that is more than a GPU has: about run.micro_batch=" in said
    fits = said.split("run.micro_batch=")[1].split()[0]
    assert dry_run(tmp_path, "launch.gpu_memory_gib=0.01", f"run.micro_batch={fits}") == 0
    assert "warning" not in capsys.readouterr().out
