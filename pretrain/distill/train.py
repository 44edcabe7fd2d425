"""The distillation stage: data, student, teacher, evaluation; the rest is shared (halfseen/stage)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfseen import data, distributed, stage, teachers
from halfseen.classification import prepare
from halfseen.classification.evaluation import Evaluations
from halfseen.config import Batches, ConfigError
from halfseen.data.transforms import finetune_transform
from halfseen.distributed import World
from halfseen.models import ViT
from halfseen.models.swin import Swin

from . import masking, store, teacher
from .config import Distill
from .student import Distilled
from .teacher import Answer, Ask

SCHEMA = Distill


def main(argv: Sequence[str]) -> int:
    """``halfseen distill RECIPE_OR_RUN key=value ...``; returns the exit code."""
    opened = stage.open_run(SCHEMA, argv)
    config, folder = opened.config, opened.folder
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, folder)
        stage.announce(config, folder, made, world)
        evaluations = Evaluations(config, folder, made.batches.micro, world) if config.data.val else None
        outcome = stage.run(opened, made, world, evaluate=evaluations)
    return stage.exit_code(outcome)


def parts(config: Distill, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    train_set = data.open_set(config.data, "train")
    batches, spans = stage.derive(config, train_set, world)
    ask, example = open_teacher(config, train_set, spans.total, world)
    student, ask = create_student(config, ask, example, world)

    transform = finetune_transform(config.augment, config.data.image_size)
    stream = stage.stream(config, train_set, transform, batches, world, folder)
    prepared = Prepare(config, batches, world.device, ask, student)
    return stage.Parts(student, train_set, batches, spans, stream, prepared, student.layer_of, student.layers())


def open_teacher(config: Distill, train_set: data.ImageSet, total: int, world: World) -> tuple[Ask, Answer]:
    """Whom to ask during a run of ``total`` images -- the teacher, a store, or both -- and an answer to one image."""
    stored, gaps = None, []
    if config.store.folder:
        folder, sizes = Path(config.store.folder), (store.block_of(config), store.span_of(config))
        store.refuse_other(folder, store.describe(config, train_set))
        stored = store.Stored(folder, *sizes, config.data.classes, world.device)
        gaps = stored.gaps(total)
        if gaps and config.store.missing == "stop":
            reason = f"{len(gaps)} shards that the run needs are missing, the first is {gaps[0]}"
            fix = "make them with `halfseen teach`, train less (run.images), or set store.missing=live"
            raise ConfigError("store.folder", config.store.folder, reason, fix)
        if world.main:
            print(f"teacher   answers in {folder}" + (f", {len(gaps)} shards missing" if gaps else ""), flush=True)
    if stored is not None and config.store.missing == "stop":
        return teacher.FromStore(stored, None), stored.example()
    live = live_teacher(config, world)
    if stored is not None:
        known = store.describe(config, train_set) | {store.DIGEST: live.teacher.digest()}
        store.refuse_other(stored.folder, known)
    example = live(black(config).to(world.device))
    return (live if stored is None else teacher.FromStore(stored, live)), example


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
    """One image, to find out shapes with."""
    return torch.zeros(1, 3, config.data.image_size, config.data.image_size)


def create_student(config: Distill, ask: Ask, example: Answer, world: World) -> tuple[Distilled, Ask]:
    """The student with random weights, on the CPU, and answers that fit its blocks; the pairs of blocks are printed."""
    stage.seed_weights(config.run.seed)  # whatever the teacher has drawn
    encoder = trunk_of(config)
    widths = teacher.widths_of(example)
    hidden_patches = None
    if config.mim.weight:
        target = masking.target_of(config.mim, encoder.patch)
        hidden_patches = masking.HiddenPatches(config.mim, encoder.width, encoder.tokens, target)
    student = Distilled(encoder, config.task, config.data.classes, config.distillation, widths, hidden_patches)
    pairs = teacher.pair_up(encoder, example, config.distillation, black(config))
    if world.main:
        for line in teacher.described(pairs, config.distillation):
            print(f"compares  {line}", flush=True)
    return student, teacher.fitted(ask, pairs)


def trunk_of(config: Distill) -> ViT | Swin:
    """The student's trunk. A ViT's linear maps start as DeiT's do, N(0, 0.02) truncated."""
    if config.trunk == "swin":
        return Swin(config.swin, config.data.image_size)
    trunk = ViT(config.model, config.data.image_size)
    for module in trunk.blocks.modules():
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
        self.masks = None
        if config.mim.weight and student is not None:
            trunk = student.encoder
            self.masks = masking.Masks(config.mim, config.run.seed, trunk.tokens, trunk.patch)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prepared = self.labelled(batch)
        answer = self.ask(prepared["image"], batch["position"], batch["key"])
        return (self.masks(prepared, batch["position"]) if self.masks else prepared) | answer
