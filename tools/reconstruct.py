"""``halfseen reconstruct``: draw what a pretraining run makes of hidden patches, beside the originals."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torchvision.io import write_png

from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.data import ImageSet, evaluation_batches, open_set
from halfseen.data.transforms import evaluation_transform
from halfseen.pretrain import objectives, targets
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.train import Prepare
from halfseen.recipes import load


def main(argv: Sequence[str]) -> int:
    """``halfseen reconstruct RUN [--out FILE.png] [--count 8] [key=value ...]``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen reconstruct", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a pretraining run")
    parser.add_argument("overrides", nargs="*", help="options, e.g. data.val=/data/other")
    parser.add_argument("--out", type=Path, help="picture to write (default: RUN/reconstruction.png)")
    parser.add_argument("--count", type=int, default=8, help="images to draw (8)")
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.count < 1:
        raise ConfigError("--count", arguments.count, "is not positive", "use a number > 0")
    # Labels are of no use here, and other images than the run's may have none.
    config = load(Pretrain, stored_config(arguments.run), [*arguments.overrides, "data.label=none", "data.classes=0"])
    asked = any(override.startswith("data.val=") for override in arguments.overrides)
    images = open_images(config, must=asked)
    picture = reconstruct(config, arguments.run, images, arguments.count)
    out = arguments.out or arguments.run / "reconstruction.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_png(picture, str(out))
    print(f"{out}: masked | reconstructed | original")
    return 0


def stored_config(run: Path) -> Path:
    """A pretraining run's config file. Raises ConfigError if there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError("run", str(run), "has no config.yaml", "name the folder of a pretraining run")
    stage = yaml.safe_load(path.read_text()).get("stage")
    if stage != "pretrain":
        raise ConfigError("run", str(run), f"is a run of stage {stage}", "name the folder of a pretraining run")
    return path


@torch.no_grad()
def reconstruct(config: Pretrain, weights: Path, images: ImageSet, count: int) -> torch.Tensor:
    """Draw the first images of a set.

    Masks come from (seed, position), as in training. weights: whatever read_weights understands. Returns uint8
    [3, height, width], one row per image.
    """
    target = targets.create(config, torch.device("cpu"))
    student = objectives.create(config, target)
    student.eval()
    prepare = Prepare(config, target, torch.device("cpu"))
    batch = prepare(first_images(config, images, count))
    if "target" not in batch:  # only the student's own average knows it (data2vec)
        student.load_state_dict(read_weights(weights, "ema"))
        batch |= student({**batch, "task": "teach"})
    student.load_state_dict(read_weights(weights))
    prediction = student({**batch, "task": "predict"})["prediction"]
    return target.picture(batch, prediction, config.augment)


def open_images(config: Pretrain, must: bool) -> ImageSet:
    """The evaluation set; the training set where the run has none or it is not at hand, unless it must be that."""
    if config.data.val:
        try:
            return open_set(config.data, "val")
        except ConfigError as error:
            if must:
                raise
            print(f"drawing training images, since the evaluation set cannot be opened: {error}")
    return open_set(config.data, "train")


def first_images(config: Pretrain, images: ImageSet, count: int) -> dict[str, Any]:
    """The first ``count`` usable images, centre-cropped, in one batch; all of them if there are fewer."""
    data = replace(config.data, workers=0)
    transform = evaluation_transform(data.image_size, data.eval_crop)
    single = evaluation_batches(images, data, transform, rank=0, world=1, batch=1)  # lazy: reads no more than it must
    rows = list(itertools.islice((batch for batch in single if len(batch["position"])), count))
    if not rows:
        raise ConfigError("data", "", "no image of it is usable", "see `halfseen shards check`")
    return {name: torch.cat([row[name] for row in rows]) for name in ("image", "position")}
