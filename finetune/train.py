"""The fine-tuning stage: data, classifier, mixing, evaluation; the rest is shared (halfseen/stage)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halfseen import data, distributed, stage
from halfseen.classification import Classifier
from halfseen.classification.evaluation import Evaluations
from halfseen.classification.prepare import Prepare
from halfseen.data.transforms import finetune_transform
from halfseen.distributed import World
from halfseen.models import ViT

from .config import Finetune

SCHEMA = Finetune


def main(argv: Sequence[str]) -> int:
    """``halfseen finetune RECIPE_OR_RUN key=value ...``; returns the exit code."""
    opened = stage.open_run(SCHEMA, argv)
    config, folder = opened.config, opened.folder
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, folder)
        stage.announce(config, folder, made, world)
        evaluations = Evaluations(config, folder, made.batches.micro, world) if config.data.val else None
        outcome = stage.run(opened, made, world, evaluate=evaluations)
    return stage.exit_code(outcome)


def parts(config: Finetune, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    stage.seed_weights(config.run.seed)
    student = create_student(config)
    train_set = data.open_set(config.data, "train")
    batches, spans = stage.derive(config, train_set, world)
    prepare = Prepare(config, batches, world.device)

    def stream(start: int) -> Iterator[dict[str, Any]]:
        return data.train_batches(
            train_set,
            config.data,
            finetune_transform(config.augment, config.data.image_size),
            seed=config.run.seed,
            start=start,
            plan=batches,
            rank=world.rank,
            ledger=folder / "ledger.jsonl",
            pin=world.device.type == "cuda",
        )

    return stage.Parts(student, train_set, batches, spans, stream, prepare, student.layer_of, student.layers())


def create_student(config: Finetune) -> Classifier:
    """The trunk and a new head, with random weights, on the CPU."""
    return Classifier(ViT(config.model, config.data.image_size), config.task, config.data.classes)
