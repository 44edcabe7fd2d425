"""The pretraining stage: data, student, target and mask put together; everything else is shared (halfseen/stage)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import nn

from halfseen import data, distributed, opening, stage
from halfseen.data.transforms import Transform, normalise, pretrain_transform
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.monitor import Monitor

from . import masks, objectives, store, stored_codes
from .config import Pretrain
from .online import Neighbours
from .targets import Target

SCHEMA = Pretrain


def main(argv: Sequence[str]) -> int:
    """``halfseen pretrain RECIPE_OR_RUN key=value ...``; returns the exit code."""
    opened = opening.open_run(SCHEMA, argv)
    config, folder = opened.config, opened.folder
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, folder)
        stage.announce(config, folder, made, world)
        picture = Pictures(config, cast(Prepare, made.prepare), lambda: first_images(config, made.train_set))
        probe = Neighbours(config, made.student, world) if config.online.k else None
        outcome = stage.run(opened, made, world, evaluate=probe, picture=picture)
    return stage.exit_code(outcome)


def parts(config: Pretrain, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    objectives.refuse_mask(config)
    train_set = open_train_set(config)
    batches, spans = stage.derive(config, train_set, world)
    stage.seed_weights(config.run.seed)
    target = stored_codes.open_target(config, train_set, spans.total, world)
    stage.seed_weights(config.run.seed)  # whatever a tokenizer or teacher has drawn
    student = objectives.create(config, target)
    prepare = Prepare(config, target, world.device)

    stream = stage.stream(config, train_set, transform_of(config), batches, world, folder, mask=masks.host(config))
    period = stored_codes.period_of(config, train_set)
    stream = store.repeated(stream, period, batches)

    def begin() -> None:
        begin_with(student, lambda count: prepare(first_images(config, train_set, count)), world)

    return stage.Parts(student, train_set, batches, spans, stream, prepare, begin=begin, period=period)


def open_train_set(config: Pretrain) -> data.ImageSet:
    """The images. Labels are never used here, so shards need not have any."""
    return data.open_set(replace(config.data, label="none", classes=0), "train")


def begin_with(student: nn.Module, first: Callable[[int], dict[str, Any]], world: World) -> None:
    """Let a student that starts from data (VQ-KD's codebook) see the run's first images.

    Rank 0 looks, and all have the result. So the start depends neither on the number of ranks nor on how a batch is
    split. first(count): prepared images.
    """
    count = getattr(student, "starts_from", 0)
    if not count:
        return
    student.to(world.device)
    if world.main:
        cast(Any, student).begin(first(count))
    if world.world > 1:
        for buffer in student.buffers():
            torch.distributed.broadcast(buffer, 0)


def transform_of(config: Pretrain, live: bool = False) -> Transform:
    """What is made of each image: a crop, and where a tokenizer is asked at another size, that as well.

    live: the tokenizer is asked even if its codes are stored.
    """
    codes = config.target.codes
    stored = bool(codes.store.folder) and codes.store.missing == "stop" and not live
    view = codes.image_size if config.target.name == "codes" and not stored else 0
    return pretrain_transform(config.augment, config.data.image_size, view or None)


def first_images(config: Pretrain, train_set: data.ImageSet, count: int = 4) -> dict[str, Any]:
    """The run's first images, the same on every rank."""
    settings = replace(config.data, workers=0)
    plan = Batches(count, 1, count, 1)
    transform = transform_of(config)
    return next(data.train_batches(train_set, settings, transform, seed=config.run.seed, start=0, plan=plan, rank=0))


class Prepare:
    """Micro-batch from the loader to what the student takes, on the device.

    Adds image float32 [B,3,S,S] normalised, mask bool [B,N] (True = hidden), the tokenizer's view of the same crop
    where it has one, and target, all functions of (seed, position) and the image alone.
    """

    def __init__(self, config: Pretrain, target: Target, device: torch.device) -> None:
        self.config, self.device = config, device
        self.target, self.mask = target, masks.create(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prepared, drawn = self.views(batch), batch.get("mask")
        if drawn is None:
            prepared["mask"] = self.mask(self.config.run.seed, prepared["position"])
        else:  # by the loader's workers, where the device cannot
            prepared["mask"] = drawn.to(self.device, non_blocking=True)
        # Stored answers are found by key and position, on the host.
        answer = self.target(prepared | {name: batch[name] for name in ("key", "position") if name in batch})
        return prepared if answer is None else prepared | {"target": answer}

    def views(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The images on the device, normalised, with their positions."""
        statistics = (self.config.augment.mean, self.config.augment.std)
        prepared = {"position": batch["position"].to(self.device, non_blocking=True)}
        for name in ("image", "view"):
            if name in batch:
                prepared[name] = normalise(batch[name].to(self.device, non_blocking=True), *statistics)
        return prepared


class Pictures:
    """What the student makes of the run's first images, as its target draws it, for TensorBoard."""

    def __init__(self, config: Pretrain, prepare: Prepare, examples: Callable[[], dict[str, Any]]) -> None:
        self.config, self.prepare, self.examples = config, prepare, examples
        self.batch: dict[str, Any] | None = None

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> None:
        # Every rank draws the same images: prediction is collective under sharding engines.
        if self.batch is None:
            self.batch = self.prepare(self.examples())
        (batch,) = engine.taught([self.batch])
        prediction = engine.predict(batch)["prediction"]
        picture = self.prepare.target.picture(batch, prediction, self.config.augment)
        monitor.picture(position, "reconstruction", picture)
        if self.config.monitor.histograms:
            for name, weight in engine.weights().items():
                monitor.histogram(position, f"weights/{name}", weight)
