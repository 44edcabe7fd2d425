"""The distillation stage: data, student, teacher, evaluation; the rest is shared (halfseen/stage)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfseen import data, distributed, opening, stage, teachers
from halfseen.classification import prepare
from halfseen.classification.evaluation import Evaluations
from halfseen.config import ConfigError
from halfseen.data.transforms import finetune_transform
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.models import ViT, trunks

from .. import store
from . import masking, teacher
from . import store as answers
from .config import Distill, Distillation
from .shares import GradientShares
from .store import Answer
from .student import Distilled
from .teacher import Ask

SCHEMA = Distill


def main(argv: Sequence[str]) -> int:
    """``halfseen distill RECIPE_OR_RUN key=value ...``; returns the exit code."""
    opened = opening.open_run(SCHEMA, argv)
    config, folder = opened.config, opened.folder
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, folder)
        stage.announce(config, folder, made, world)
        evaluations = Evaluations(config, folder, made.batches.micro, world) if config.data.val else None
        shares = gradient_shares(config, made, world) if config.distillation.gradients else None
        outcome = stage.run(opened, made, world, evaluate=evaluations, picture=shares)
    return stage.exit_code(outcome)


def parts(config: Distill, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    train_set = data.open_set(config.data, "train")
    batches, spans = stage.derive(config, train_set, world)
    ask, example = open_teacher(config, train_set, spans.total, world)
    student, ask = create_student(config, ask, example, world)

    transform = finetune_transform(config.augment, config.data.image_size)
    stream = stage.stream(config, train_set, transform, batches, world, folder, mask=masking.host(config))
    period = store.period_of(config, config.store, "store", train_set.images)
    stream = store.repeated(stream, period, batches)
    prepared = Prepare(config, batches, world.device, ask, student)
    layers = (student.layer_of, student.layers())
    return stage.Parts(student, train_set, batches, spans, stream, prepared, *layers, period=period)


def gradient_shares(config: Distill, made: stage.Parts, world: World) -> GradientShares:
    """Measures the terms' gradients on this rank's first micro-batch of the run."""
    transform = finetune_transform(config.augment, config.data.image_size)

    def first() -> dict[str, Any]:
        settings, mask = replace(config.data, workers=0), masking.host(config)
        batches = data.train_batches(
            made.train_set,
            settings,
            transform,
            seed=config.run.seed,
            start=0,
            plan=made.batches,
            rank=world.rank,
            mask=mask,
        )
        return made.prepare(next(batches))

    return GradientShares(cast(Distilled, made.student).terms, first)


def open_teacher(config: Distill, train_set: data.ImageSet, total: int, world: World) -> tuple[Ask, Answer]:
    """Whom to ask during a run of ``total`` images -- the teacher, a store, or both -- and an answer to one image."""
    cfg = config.store
    if not cfg.folder:
        live = live_teacher(config, world)
        return live, live(black(config).to(world.device))
    folder, described = Path(cfg.folder), answers.describe(config, train_set)
    store.refuse_other(folder, described)
    stored = answers.Stored(
        folder, answers.block_of(config), answers.span_of(config), config.data.classes, world.device
    )
    period = store.period_of(config, cfg, "store", train_set.images)
    gaps = store.refuse_gaps(stored, min(total, period or total), cfg, "store")
    if world.main:
        print(f"teacher   answers in {folder}" + (f", {len(gaps)} shards missing" if gaps else ""), flush=True)
    if cfg.missing == "stop":
        return teacher.FromStore(stored, None), stored.one()
    live = live_teacher(config, world)
    store.refuse_other(folder, described | {answers.DIGEST: live.teacher.digest()})
    return teacher.FromStore(stored, live), live(black(config).to(world.device))


def live_teacher(config: Distill, world: World) -> teacher.Live:
    """The teacher itself, checked; its licence is printed with it."""
    stage.seed_weights(config.run.seed)
    found = teachers.load(
        config.teacher,
        student=(config.augment.mean, config.augment.std),
        image_size=config.data.image_size,
        device=world.device,
    )
    chosen = config.distillation
    found.check(None if chosen.scores == "none" else config.data.classes, chosen.teacher)
    if world.main:
        print(f"teacher   {found}", flush=True)
    return teacher.Live(found, chosen)


def black(config: Distill) -> Tensor:
    """One image [1, 3, S, S], to find out shapes with."""
    return torch.zeros(1, 3, config.data.image_size, config.data.image_size)


def create_student(config: Distill, ask: Ask, example: Answer, world: World) -> tuple[Distilled, Ask]:
    """The student with random weights, on the CPU, and answers that fit its blocks; the pairs of blocks are printed."""
    stage.seed_weights(config.run.seed)  # whatever the teacher has drawn
    encoder = trunk_of(config)
    refuse_beyond(config.distillation, encoder.depth)
    widths = teacher.widths_of(example)
    hidden_patches = masking.create(config, encoder, world.device)
    student = Distilled(encoder, config.task, config.data.classes, config.distillation, widths, hidden_patches)
    pairs = teacher.pair_up(encoder, example, config.distillation, black(config))
    if world.main:
        for line in teacher.described(pairs, config.distillation):
            print(f"compares  {line}", flush=True)
    return student, teacher.fitted(ask, pairs)


def refuse_beyond(chosen: Distillation, depth: int) -> None:
    """Raise ConfigError if the student has fewer blocks than are to be compared."""
    if chosen.student_layers and chosen.student_layers[-1] >= depth:
        reason = f"the student has {depth} blocks, 0 to {depth - 1}; each use of a shared one counts"
        raise ConfigError("distillation.student_layers", chosen.student_layers, reason, "correct the list")


def trunk_of(config: Distill) -> trunks.Trunk:
    """The student's trunk. A ViT's linear maps start as DeiT's do, N(0, 0.02) truncated."""
    trunk = trunks.trunk_of(config)
    for module in trunk.blocks.modules() if isinstance(trunk, ViT) else ():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return trunk


class Prepare:
    """Micro-batch from the loader to what the student takes: image and target as in fine-tuning, and the teacher's
    answer to the same images, erased and mixed. teacher_ms is how long the last known answer took.
    """

    def __init__(
        self, config: Distill, batches: Batches, device: torch.device, ask: Ask, student: Distilled | None = None
    ) -> None:
        """student: where patches are to be hidden from one."""
        self.labelled = prepare.Prepare(config, batches, device)
        self.ask = teacher.Timed(ask, device)
        part = student.hidden_patches if student is not None else None
        self.masks = masking.Masks(config, part.target) if part is not None else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prepared = self.labelled(batch)
        answer = self.ask(prepared["image"], batch["position"], batch["key"])
        return (self.masks(prepared, batch) if self.masks else prepared) | answer
