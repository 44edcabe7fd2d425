"""The pretraining stage: data, student, target and mask put together; everything else is shared (halfseen/stage)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from halfseen import data, distributed, stage
from halfseen.config import Batches
from halfseen.data.transforms import normalise, pretrain_transform
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.monitor import Monitor

from . import masks, objectives, targets
from .config import Pretrain
from .targets import Target

SCHEMA = Pretrain


def main(argv: Sequence[str]) -> int:
    """``halfseen pretrain RECIPE_OR_RUN key=value ...``; returns the exit code."""
    opened = stage.open_run(SCHEMA, argv)
    config, folder = opened.config, opened.folder
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, folder)
        stage.announce(config, folder, made, world)
        picture = Pictures(config, cast(Prepare, made.prepare), lambda: first_images(config, made.train_set))
        outcome = stage.run(opened, made, world, picture=picture)
    return stage.exit_code(outcome)


def parts(config: Pretrain, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    stage.seed_weights(config.run.seed)
    target = targets.create(config, world.device)
    student = objectives.create(config, target)
    # Labels are never used here, so shards need not have any.
    train_set = data.open_set(replace(config.data, label="none", classes=0), "train")
    batches, spans = stage.derive(config, train_set, world)
    prepare = Prepare(config, target, world.device)

    def stream(start: int) -> Iterator[dict[str, Any]]:
        return data.train_batches(
            train_set,
            config.data,
            pretrain_transform(config.augment, config.data.image_size),
            seed=config.run.seed,
            start=start,
            plan=batches,
            rank=world.rank,
            ledger=folder / "ledger.jsonl",
            pin=world.device.type == "cuda",
        )

    return stage.Parts(student, train_set, batches, spans, stream, prepare)


def first_images(config: Pretrain, train_set: data.ImageSet) -> dict[str, Any]:
    """The run's first four images, the same on every rank."""
    transform = pretrain_transform(config.augment, config.data.image_size)
    settings = replace(config.data, workers=0)
    plan = Batches(4, 1, 4, 1)
    return next(data.train_batches(train_set, settings, transform, seed=config.run.seed, start=0, plan=plan, rank=0))


class Prepare:
    """Micro-batch from the loader to what the student takes, on the device.

    Adds image float32 [B,3,S,S] normalised, mask bool [B,N] (True = hidden) and target, all functions of
    (seed, position) and the image alone.
    """

    def __init__(self, config: Pretrain, target: Target, device: torch.device) -> None:
        self.config, self.device = config, device
        self.target, self.mask = target, masks.create(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        image = batch["image"].to(self.device, non_blocking=True)
        position = batch["position"].to(self.device, non_blocking=True)
        prepared = {
            "image": normalise(image, self.config.augment.mean, self.config.augment.std),
            "mask": self.mask(self.config.run.seed, position),
            "position": position,
        }
        return prepared | {"target": self.target(prepared)}


class Pictures:
    """What the student makes of the run's first images, as its target draws it, for TensorBoard."""

    def __init__(self, config: Pretrain, prepare: Prepare, examples: Callable[[], dict[str, Any]]) -> None:
        self.config, self.prepare, self.examples = config, prepare, examples
        self.batch: dict[str, Any] | None = None

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> None:
        # Every rank draws the same images: prediction is collective under sharding engines.
        if self.batch is None:
            self.batch = self.prepare(self.examples())
        prediction = engine.predict(self.batch)["prediction"]
        picture = self.prepare.target.picture(self.batch, prediction, self.config.augment)
        monitor.picture(position, "reconstruction", picture)
        if self.config.monitor.histograms:
            for name, weight in engine.weights().items():
                monitor.histogram(position, f"weights/{name}", weight)
