"""Exact evaluation of a classifier: top-1, top-5, loss, calibration, accuracy and confusion by class."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.io import write_png

from halfseen import distributed, engines, optim, origin
from halfseen.checkpoint import read_weights
from halfseen.classification import Classifier
from halfseen.classification.answers import Answers
from halfseen.classification.evaluation import Normalise, Result, confusion_picture, evaluate, open_val, worst
from halfseen.classification.gallery import Gallery
from halfseen.config import ConfigError, Model, positive
from halfseen.distributed import World
from halfseen.engine_config import ANYWHERE
from halfseen.models.sizes import resolve
from halfseen.models.trunks import section_of, trunk_of
from halfseen.models.vit import grid_of
from halfseen.recipes import load
from halfseen.weights import initialise

from . import predictions
from .config import Finetune

PREDICTING = ("engine.ema=0", "task.frozen=fp32", "task.recompute_mlp=false")


def main(argv: Sequence[str]) -> int:
    """``halfseen evaluate RUN [key=value ...]``; returns the exit code. Works under torchrun."""
    arguments = parse(argv)
    config = config_of(arguments.run, arguments.overrides)
    refuse(arguments, config)
    if not config.data.val:
        raise ConfigError("data.val", config.data.val, "names no evaluation set", "e.g. data.val=/data/imagenet/val")
    answers = Answers.read(arguments.label_map, arguments.answers, config.data.classes)
    weights = read_weights(arguments.run, "ema" if arguments.ema else "model")
    with distributed.started(config.engine.device) as world:
        results: dict[int, Result] = {}
        for size in arguments.sizes or [config.data.image_size]:
            config.data.image_size = size
            results[size] = once(config, weights, arguments, answers, world)
            if world.main:
                print(f"{size} px: {results[size]}" if arguments.sizes else results[size], flush=True)
        if world.main:
            last = results[config.data.image_size]
            report(last, arguments.json, results if arguments.sizes else None)
            if arguments.confusion:
                write_png(confusion_picture(last.confusion), str(arguments.confusion))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="halfseen evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a fine-tuning run, one of its checkpoints, or a file of `delta apply`")
    parser.add_argument("overrides", nargs="*", help="options, e.g. data.val=/data/other engine.device=cpu")
    parser.add_argument("--ema", action="store_true", help="evaluate the averaged weights")
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass and rank (default 256)")
    parser.add_argument("--json", type=Path, help="write the numbers, with the confusion matrix, to this file")
    sizes = "evaluate at each of these sizes, e.g. 224,288,384 (positions are resampled)"
    parser.add_argument("--sizes", type=numbers, default=[], help=sizes)
    parser.add_argument("--label-map", type=Path, metavar="FILE", help="JSON: the class of each label of the set")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="JSON: every image's right classes (ReaL)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write every prediction: .jsonl or .parquet")
    parser.add_argument("--gallery", type=Path, metavar="PNG", help="draw the mistakes it is surest of")
    parser.add_argument("--confusion", type=Path, metavar="PNG", help="draw the confusion matrix")
    return parser.parse_intermixed_args(argv)


def refuse(arguments: argparse.Namespace, config: Finetune) -> None:
    """Raise ConfigError for what could only fail once everything is computed."""
    predictions.refuse(arguments.predictions)
    positive("--batch", arguments.batch)
    for size in arguments.sizes:
        if isinstance(section_of(config), Model):
            grid_of(size, resolve(config.model).patch)
    for option in ("json", "predictions", "gallery", "confusion"):
        path = getattr(arguments, option)
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{option}", str(path), "is in no folder", "make the folder first")
        if path is not None and option in ("gallery", "confusion") and path.suffix != ".png":
            raise ConfigError(f"--{option}", str(path), "is a picture in PNG", "end its name in .png")


def numbers(text: str) -> list[int]:
    """Numbers apart by commas."""
    return [int(part) for part in text.split(",")]


def once(
    config: Finetune, weights: dict[str, Tensor], arguments: argparse.Namespace, answers: Answers, world: World
) -> Result:
    """The evaluation at config.data.image_size. Collective."""
    student = Classifier(trunk_of(config), config.task, config.data.classes)
    given = initialise(student, weights, coverage=1.0)
    if given.new:
        lacking = ", ".join(f"{name} ({why})" for name, why in given.new.items())
        raise ConfigError("run", str(arguments.run), f"lacks {lacking}", "leave out options that change the model")
    groups = optim.groups(student, config.optim)
    engine = engines.create(config.engine, student, config.optim, groups, world, config.run.seed)
    listed = predictions.Predictions() if arguments.predictions else None
    gallery = Gallery(32, config.augment.mean, config.augment.std) if arguments.gallery else None
    sinks = [sink for sink in (listed, gallery) if sink is not None]

    def sink(*seen: Any) -> None:
        for each in sinks:
            each(*seen)

    classes = config.data.classes
    prepare = Normalise(config, world.device, answers.label_count(classes))
    batches = open_val(config, arguments.batch, world)
    result = evaluate(engine, batches, prepare, classes, world, answers=answers, sink=sink)
    several = len(arguments.sizes) > 1
    if listed is not None:
        listed.write(named(arguments.predictions, config.data.image_size, several), world)
    if gallery is not None:
        picture = gallery.gather(world)
        if world.main:
            write_png(picture, str(named(arguments.gallery, config.data.image_size, several)))
    return result


def named(path: Path, size: int, several: bool) -> Path:
    """A file's name, with the size in it if there are several."""
    return path.with_name(f"{path.stem}_{size}{path.suffix}") if several else path


def config_of(run: Path, overrides: Sequence[str]) -> Finetune:
    """The config of what is evaluated, for predicting alone: no averages are kept, nothing is frozen in another type.

    The engine is that of any machine, unless asked for: the one that trained may not be at hand.

    That of a distilled classifier is read as fine-tuning would have it: the sections that both stages have.
    """
    found = origin.require("run", run)
    refuse_pretraining(run, found.said)
    known = {part.name for part in fields(Finetune)} - {"stage", "stages"}
    shared = {name: value for name, value in found.said.items() if name in known}
    config = load(Finetune, None, [*ANYWHERE, *overrides, *PREDICTING], [shared])
    config.run.folder = str(found.weights if run.is_dir() else run.parent)  # it may have moved since it was written
    return config


def refuse_pretraining(run: Path, said: dict[str, Any]) -> None:
    """Raise ConfigError for weights of a stage that has no classifier to evaluate."""
    stage = said.get("stage", "pretrain")
    if stage in ("finetune", "distill"):
        return
    fix = f"fine-tune it first (`halfseen finetune RECIPE run.init={run}`) and evaluate that run"
    if stage == "pretrain":
        fix += f", or see what it reconstructs (`halfseen reconstruct {run}`)"
    raise ConfigError("run", str(run), f"is of the stage {stage}: it has no classifier", fix)


def report(result: Result, path: Path | None, sizes: dict[int, Result] | None = None) -> None:
    """Print the worst classes; write the numbers to a file if asked, those of other sizes beside them."""
    print("worst classes:  class  accuracy  images  most often taken for")
    for number, accuracy, count, instead in worst(result):
        print(f"{number:>21}  {accuracy:>8.1%}  {count:>6}  {instead if accuracy < 1 else '-':>5}")
    if path:
        written = plain(result)
        if sizes:
            written["sizes"] = {size: plain(found) for size, found in sizes.items()}
        path.write_text(json.dumps(written) + "\n")


def plain(result: Result) -> dict[str, Any]:
    """A result as JSON; a class without images has no accuracy."""
    per_class = [None if value != value else value for value in result.per_class.tolist()]
    numbers: dict[str, Any] = {"images": result.count, **result.scalars("val")}
    return numbers | {"per_class": per_class, "confusion": result.confusion.tolist()}
