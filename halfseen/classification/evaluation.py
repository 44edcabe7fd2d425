"""Top-1, top-5 and confusion of a classifier over a whole evaluation set, each image once on any number of ranks."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfseen import data
from halfseen.config import ConfigError
from halfseen.data.transforms import evaluation_transform, normalise
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.loop import BROKEN
from halfseen.monitor import Monitor

Prepare = Callable[[dict[str, Any]], dict[str, Any]]
LEDGER = "evaluation-ledger.jsonl"  # in the run folder: every image that evaluations left out, and why


@dataclass(frozen=True)
class Result:
    """What an evaluation found; accuracies are shares from 0 to 1."""

    count: int  # images
    top1: float
    top5: float  # of the K best when there are fewer than five classes
    loss: float  # mean cross entropy with the plain label
    confusion: Tensor  # int64 [K, K] on the CPU: row true class, column predicted class
    left_out: int = 0  # images that could not be read, decoded or labelled: in none of the numbers above

    @property
    def per_class(self) -> Tensor:
        """Accuracy of each class, float64 [K]; NaN for a class without images."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def mean_class(self) -> float:
        """Mean over the classes that have images."""
        return float(self.per_class.nanmean())

    def scalars(self, prefix: str = "val") -> dict[str, float]:
        """The numbers a monitor shows."""
        values = {"top1": self.top1, "top5": self.top5, "loss": self.loss, "mean_class": self.mean_class}
        return {f"{prefix}/{name}": value for name, value in (values | {"left_out": self.left_out}).items()}

    def __str__(self) -> str:
        text = (
            f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  mean of classes {self.mean_class:.2%}  "
            f"loss {self.loss:.4f}  over {self.count:,} images"
        )
        if self.left_out:
            total = self.count + self.left_out
            text += f"; {self.left_out:,} of {total:,} left out: see {LEDGER} in the run folder"
        return text


class Normalise:
    """Batch from the loader to what the classifier predicts from, on the device."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self.config, self.device = config, device

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        check_labels(batch["label"], self.config.data.classes)
        image = batch["image"].to(self.device, non_blocking=True)
        image = normalise(image, self.config.augment.mean, self.config.augment.std)
        return {"image": image, "label": batch["label"].to(self.device, non_blocking=True)}


def check_labels(label: Tensor, classes: int) -> None:
    """Refuse labels int64 [B], on the host, outside 0..classes-1."""
    wrong = label[(label < 0) | (label >= classes)]
    if len(wrong):
        raise ConfigError(
            "data.classes",
            classes,
            f"a sample's label is {wrong[0].item()}",
            "count the classes, or correct data.label",
        )


def open_val(config: Any, batch: int, world: World) -> Iterator[dict[str, Any]]:
    """This rank's batches of the evaluation set, each image once over all ranks.

    What has to be left out is listed in the run folder (run.folder).
    """
    return data.evaluation_batches(
        data.open_set(config.data, "val"),
        config.data,
        evaluation_transform(config.data.image_size),
        rank=world.rank,
        world=world.world,
        batch=batch,
        ledger=Path(config.run.folder) / LEDGER if config.run.folder else None,
        pin=world.device.type == "cuda",
    )


def evaluate(engine: Engine, batches: Iterable[dict[str, Any]], prepare: Prepare, classes: int, world: World) -> Result:
    """Run every image of an evaluation set once, over all ranks. Collective.

    batches: this rank's share, with image, label, position and left_out; at least one, which may be empty. Ranks may
    have different numbers of them.
    """
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # top-5 hits, loss, images left out
    share = Share(batches, prepare)
    for batch, counts in in_step(share, world):
        logits = engine.predict(batch)["logits"].float()
        if not counts:
            continue
        label = batch["label"]
        confusion.index_add_(0, label * classes + logits.argmax(-1), torch.ones_like(label))
        best = logits.topk(min(5, classes)).indices
        sums[0] += (best == label[:, None]).sum()
        sums[1] += F.cross_entropy(logits, label, reduction="sum")
    matrix = world.sum(confusion).view(classes, classes).cpu()
    sums[2] += share.left_out
    hits, loss, left_out = world.sum(sums).tolist()
    count = int(matrix.sum())
    if not count:
        raise ConfigError("data.val", "", f"none of its {left_out:.0f} images is usable", "see `halfseen shards check`")
    return Result(count, int(matrix.diagonal().sum()) / count, hits / count, loss / count, matrix, int(left_out))


class Share:
    """One rank's batches without the empty ones, prepared, and one to go on predicting when there are no more.

    Predicting is collective under sharding engines: a rank that has run out repeats its last batch, or predicts a
    black image if it never had one.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], prepare: Prepare) -> None:
        self.batches, self.prepare = iter(batches), prepare
        self.left_out = 0  # in the batches taken so far
        self.last: dict[str, Any] | None = None

    def take(self) -> bool:
        """Put the next batch that holds an image in ``last``; False when there is none."""
        for batch in self.batches:
            self.left_out += batch.get("left_out", 0)
            if len(batch["position"]):
                self.last = self.prepare(batch)
                return True
            if self.last is None:
                self.last = self.prepare(blank(batch))
        if self.last is None:
            raise RuntimeError("this rank was given no batch, not even an empty one")
        return False


def blank(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of one black image with label 0, of an empty batch's shapes."""
    return {name: value.new_zeros(1, *value.shape[1:]) for name, value in batch.items() if isinstance(value, Tensor)}


def in_step(share: Share, world: World) -> Iterator[tuple[dict[str, Any], bool]]:
    """A rank's batches, and whether each counts; equally many on all ranks. Collective.

    If one rank cannot read its images, all raise: none waits for it for ever.
    """
    while True:
        counts, failure = False, None
        try:
            counts = share.take()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        message = world.largest(BROKEN if failure else int(counts))
        if failure:
            raise failure
        if message >= BROKEN:
            raise RuntimeError("another rank could not read its evaluation images; that rank's message says why")
        if not message:
            return
        assert share.last is not None, "take raises otherwise"
        yield share.last, counts


def worst(result: Result, most: int = 10) -> list[tuple[int, float, int, int]]:
    """The classes named wrongly most often: (class, accuracy, images, the class most often named instead)."""
    accuracy = result.per_class
    ranked = sorted((value, number) for number, value in enumerate(accuracy.tolist()) if value == value)
    wrong = result.confusion.clone().fill_diagonal_(-1)
    return [(k, value, int(result.confusion[k].sum()), int(wrong[k].argmax())) for value, k in ranked[:most]]


def confusion_picture(matrix: Tensor, side: int = 512) -> Tensor:
    """A confusion matrix [K, K] as a picture uint8 [3, H, W]: rows true, columns predicted, dark means often.

    Each row is scaled to shares of its class; up to ``side`` classes keep whole pixels, more are averaged.
    """
    share = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    classes = len(share)
    if classes <= side:
        picture = share.repeat_interleave(side // classes, 0).repeat_interleave(side // classes, 1)
    else:
        picture = F.adaptive_avg_pool2d(share[None], side)[0]
        picture = picture / picture.max().clamp(min=1e-12)
    # Square root: a confusion of one in a hundred must still be visible. Blue on white.
    ink = picture.clamp(0, 1).sqrt()
    paper, blue = torch.tensor([255.0, 255.0, 255.0]), torch.tensor([8.0, 48.0, 107.0])
    colour = paper[:, None, None] + (blue - paper)[:, None, None] * ink[None]
    return colour.round().to(torch.uint8)


class Evaluations:
    """Evaluates the student, and its averaged weights when the engine keeps some; writes evaluation.json.

    evaluation.json holds one entry per evaluation and the best one so far; a resume drops those beyond its
    position.
    """

    def __init__(self, config: Any, folder: Path, batch: int, world: World) -> None:
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
