"""The fine-tuning stage: data, classifier, mixing, evaluation; the rest is shared (halfseen/stage)."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from halfseen import data, distributed, stage
from halfseen.config import Batches
from halfseen.data.transforms import finetune_transform
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.models import ViT
from halfseen.monitor import Monitor

from . import mixing
from .classify import Classifier
from .config import Finetune
from .evaluate import Normalise, Result, confusion_picture, evaluate, open_val

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


class Prepare:
    """Micro-batch from the loader to what the classifier trains on, on the device.

    Adds image float32 [B, 3, S, S] normalised, erased and mixed, and target float32 [B, K]; all of it depends
    on (seed, position), the images and their labels alone.
    """

    def __init__(self, config: Finetune, batches: Batches, device: torch.device) -> None:
        self.config, self.device = config, device
        self.normalise = Normalise(config, device)
        self.mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        if self.mixes:
            self.stride = mixing.resolve_stride(batches.total, config.task.mix_stride)
            mixing.check_split(self.stride, batches, config.data.repeats)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        augment, seed, position = self.config.augment, self.config.run.seed, batch["position"]
        prepared = self.normalise(batch)
        image = mixing.erase(prepared["image"], position, seed=seed, probability=augment.erase)
        target = mixing.soft_targets(prepared["label"], self.config.data.classes, self.config.task.smoothing)
        if self.mixes:
            side = self.config.data.image_size
            mix = mixing.draw(position, seed=seed, stride=self.stride, augment=augment, side=side).to(self.device)
            image, target = mixing.mix_images(image, mix), mixing.mix_targets(target, mix)
        return {"image": image, "target": target}


class Evaluations:
    """Evaluates the student, and its averaged weights when the engine keeps some; writes evaluation.json.

    evaluation.json holds one entry per evaluation and the best one so far; a resume drops those beyond its
    position.
    """

    def __init__(self, config: Finetune, folder: Path, batch: int, world: World) -> None:
        self.config, self.batch, self.world = config, batch, world
        self.path = folder / "evaluation.json"
        self.prepare = Normalise(config, world.device)

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> dict[str, float]:
        result = self.evaluate(engine)
        values = result.scalars("val")
        monitor.note(f"evaluated {position:,} images: {result}")
        if self.config.engine.ema:
            with engine.averaged():
                averaged = self.evaluate(engine)
            values |= averaged.scalars("val_ema")
            monitor.note(f"  averaged weights: {averaged}")
        monitor.picture(position, "val/confusion", confusion_picture(result.confusion))
        if self.world.main:
            self.record(position, result.count, values)
        return values

    def evaluate(self, engine: Engine) -> Result:
        """Every image of the evaluation set once."""
        batches = open_val(self.config, self.batch, self.world)
        return evaluate(engine, batches, self.prepare, self.config.data.classes, self.world)

    def record(self, position: int, count: int, values: dict[str, float]) -> None:
        """Add an evaluation to the file, in one move."""
        earlier = json.loads(self.path.read_text())["evaluations"] if self.path.exists() else []
        listed = [entry for entry in earlier if entry["position"] < position]
        listed.append({"position": position, "images": count, **values})
        best = max(listed, key=lambda entry: max(entry["val/top1"], entry.get("val_ema/top1", 0.0)))
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"best": best, "last": listed[-1], "evaluations": listed}, indent=2) + "\n")
        os.replace(partial, self.path)
