"""Exact evaluation of a classifier: top-1, top-5, loss, accuracy and confusion by class."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from halfseen import distributed, engines, optim
from halfseen.checkpoint import read_weights
from halfseen.classification import Classifier
from halfseen.classification.evaluation import Normalise, Result, evaluate, open_val, worst
from halfseen.config import ConfigError, load
from halfseen.models import ViT

from .config import Finetune


def main(argv: Sequence[str]) -> int:
    """``halfseen evaluate RUN [key=value ...]``; returns the exit code. Works under torchrun."""
    parser = argparse.ArgumentParser(prog="halfseen evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a fine-tuning run's folder, or one of its checkpoints")
    parser.add_argument("overrides", nargs="*", help="options, e.g. data.val=/data/other engine.device=cpu")
    parser.add_argument("--ema", action="store_true", help="evaluate the averaged weights")
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass and rank (default 256)")
    parser.add_argument("--json", type=Path, help="write the numbers, with the confusion matrix, to this file")
    arguments = parser.parse_intermixed_args(argv)
    stored = find_config(arguments.run)
    refuse_pretraining(stored)
    # An engine for predicting alone: it keeps no average of weights. The folder may have moved since it was written.
    config = load(Finetune, stored, [*arguments.overrides, "engine.ema=0"])
    config.run.folder = str(stored.parent)
    if not config.data.val:
        raise ConfigError("data.val", config.data.val, "names no evaluation set", "e.g. data.val=/data/imagenet/val")
    student = Classifier(ViT(config.model, config.data.image_size), config.task, config.data.classes)
    student.load_state_dict(read_weights(arguments.run, "ema" if arguments.ema else "model"))
    with distributed.started(config.engine.device) as world:
        groups = optim.groups(student, config.optim)
        engine = engines.create(config.engine, student, config.optim, groups, world, config.run.seed)
        batches, prepare = open_val(config, arguments.batch, world), Normalise(config, world.device)
        result = evaluate(engine, batches, prepare, config.data.classes, world)
        if world.main:
            report(result, arguments.json)
    return 0


def find_config(run: Path) -> Path:
    """The config.yaml of a run folder or of a checkpoint inside one."""
    for folder in (run, *run.resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ConfigError("run", str(run), "has no config.yaml beside or above it", "name a run folder")


def refuse_pretraining(stored: Path) -> None:
    """Raise ConfigError if a run's config is of the pretraining stage: it has no classifier to evaluate."""
    if (yaml.safe_load(stored.read_text()) or {}).get("stage") == "pretrain":
        run = stored.parent
        raise ConfigError(
            "run",
            str(run),
            "is a pretraining run: it has no classifier",
            f"fine-tune it first (`halfseen finetune RECIPE run.init={run}`) and evaluate that run, or see what it "
            f"reconstructs (`halfseen reconstruct {run}`)",
        )


def report(result: Result, path: Path | None) -> None:
    """Print the numbers and the worst classes; write them to a file if asked."""
    print(result)
    print("worst classes:  class  accuracy  images  most often taken for")
    for number, accuracy, count, instead in worst(result):
        print(f"{number:>21}  {accuracy:>8.1%}  {count:>6}  {instead if accuracy < 1 else '-':>5}")
    if path:
        numbers = {"images": result.count, **result.scalars("val"), "confusion": result.confusion.tolist()}
        path.write_text(json.dumps(numbers) + "\n")
