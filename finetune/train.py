"""The fine-tuning stage: data, classifier, mixing, evaluation; the rest is shared (halfseen/stage)."""

from collections.abc import Sequence
from pathlib import Path

from halfseen import data, distributed, opening, selection, stage
from halfseen.classification import Classifier
from halfseen.classification.evaluation import Evaluations
from halfseen.classification.prepare import Prepare
from halfseen.data.transforms import finetune_transform
from halfseen.distributed import World
from halfseen.loop import Outcome
from halfseen.models.trunks import trunk_of

from . import stages
from .config import Finetune

SCHEMA = Finetune
TRAINED = "trained.json"  # in the run folder: names, counts and bytes of what trains and what is frozen


def main(argv: Sequence[str]) -> int:
    """``halfseen finetune RECIPE_OR_RUN key=value ...``; returns the exit code."""
    plain, own = stages.split(argv)
    opened = opening.open_run(SCHEMA, plain)
    planned = stages.plan(opened.config, opened.folder, plain[1:], own)
    with distributed.started(opened.config.engine.device) as world:
        outcome = stages.run(opened, planned, world, train) if planned else train(opened, world)
    return stage.exit_code(outcome)


def train(opened: opening.Opened[Finetune], world: World) -> Outcome:
    """One stage in one folder: train, evaluate, save."""
    config, folder = opened.config, opened.folder
    made = parts(config, world, folder)
    stage.announce(config, folder, made, world)
    chosen = selection.describe(made.student, config.task.train)
    if world.main:
        print(f"trains    {chosen}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        chosen.write(folder / TRAINED)
    evaluations = Evaluations(config, folder, made.batches.micro, world) if config.data.val else None
    return stage.run(opened, made, world, evaluate=evaluations)


def parts(config: Finetune, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    stage.seed_weights(config.run.seed)
    student = create_student(config)
    train_set = data.open_set(config.data, "train")
    batches, spans = stage.derive(config, train_set, world)
    prepare = Prepare(config, batches, world.device)

    transform = finetune_transform(config.augment, config.data.image_size)
    stream = stage.stream(config, train_set, transform, batches, world, folder)
    return stage.Parts(student, train_set, batches, spans, stream, prepare, student.layer_of, student.layers())


def create_student(config: Finetune) -> Classifier:
    """The trunk and a new head, with random weights, on the CPU."""
    return Classifier(trunk_of(config), config.task, config.data.classes)
