"""Top-1, top-5 and confusion of a classifier over a whole evaluation set, each image once on any number of ranks."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from halfseen import data
from halfseen.config import ConfigError
from halfseen.data.transforms import evaluation_transform, normalise
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.loop import BROKEN, AnotherRank
from halfseen.monitor import Monitor
from halfseen.recipes import to_yaml
from halfseen.writing import write_whole

from .answers import Answers
from .gallery import Gallery

Prepare = Callable[[dict[str, Any]], dict[str, Any]]
Sink = Callable[[dict[str, Any], Tensor, Tensor], None]  # batch, probabilities [B, K], right classes bool [B, K]
MISTAKES = 16  # pictures of them in TensorBoard, of rank 0's share
BINS = 15  # of confidence, equally wide: what the calibration error is a mean over
BEST = "best.safetensors"  # in the run folder: the weights of the best evaluation so far
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
    bins: Tensor | None = None  # float64 [BINS, 3]: images, sum of their confidences, how many are right

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, over bins by their images."""
        assert self.bins is not None, "evaluate makes them"
        return float((self.bins[:, 1] - self.bins[:, 2]).abs().sum() / self.bins[:, 0].sum())

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
        values |= {"left_out": self.left_out} | ({"ece": self.ece} if self.bins is not None else {})
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        text = (
            f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  mean of classes {self.mean_class:.2%}  "
            f"loss {self.loss:.4f}  "
        )
        text += f"calibration error {self.ece:.4f}  " if self.bins is not None else ""
        text += f"over {self.count:,} images"
        if self.left_out:
            total = self.count + self.left_out
            text += f"; {self.left_out:,} of {total:,} left out: see {LEDGER} in the run folder"
        return text


class Normalise:
    """Batch from the loader to what the classifier predicts from, on the device; keys stay on the host."""

    def __init__(self, config: Any, device: torch.device, labels: int | None = None) -> None:
        self.config, self.device = config, device
        self.labels = config.data.classes if labels is None else labels  # how many the set has

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        check_labels(batch["label"], self.labels)
        image = batch["image"].to(self.device, non_blocking=True)
        image = normalise(image, self.config.augment.mean, self.config.augment.std)
        made: dict[str, Any] = {"image": image, "label": batch["label"].to(self.device, non_blocking=True)}
        return made | {name: batch[name] for name in ("key", "position") if name in batch}


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
        evaluation_transform(config.data.image_size, config.data.eval_crop),
        rank=world.rank,
        world=world.world,
        batch=batch,
        ledger=Path(config.run.folder) / LEDGER if config.run.folder else None,
        pin=world.device.type == "cuda",
    )


def evaluate(
    engine: Engine,
    batches: Iterable[dict[str, Any]],
    prepare: Prepare,
    classes: int,
    world: World,
    *,
    answers: Answers | None = None,
    sink: Sink | None = None,
) -> Result:
    """Run every image of an evaluation set once, over all ranks. Collective.

    batches: this rank's share, with image, label, position and left_out; at least one, which may be empty. Ranks may
    have different numbers of them. answers: what counts as right, else the label. sink sees each batch of this rank.
    """
    answers = answers or Answers()
    score = Score(classes, answers.allowed(classes), world.device)
    share = Share(batches, prepare)
    for batch, counts in in_step(share, world):
        logits = engine.predict({"image": batch["image"]})["logits"].float()
        if not counts:
            continue
        right = answers.right(batch, classes)
        probability = score.add(logits, right)
        if sink:
            sink(batch, probability, right)
    return score.result(share.left_out, world)


class Score:
    """Sums over images, on the device; nothing is read from it before the end."""

    def __init__(self, classes: int, allowed: Tensor | None, device: torch.device) -> None:
        self.classes = classes
        self.allowed = None if allowed is None else allowed.to(device)
        self.confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # top-5 hits, loss
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, right: Tensor) -> Tensor:
        """Count a batch: logits [B, K], right classes bool [B, K]. Returns its probabilities [B, K]."""
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, float("-inf"))
        probability = logits.softmax(-1)
        counted = right.any(-1)
        confidence, named = probability.max(-1)
        hit = right.gather(1, named[:, None])[:, 0]
        # Of several right answers, the one that was named stands in the matrix, else the first.
        true = torch.where(hit, named, right.int().argmax(-1))
        self.confusion.index_add_(0, true * self.classes + named, counted.long())
        best = logits.topk(min(5, self.classes)).indices
        share = right / right.sum(-1, keepdim=True).clamp(min=1)
        loss = -(logits.log_softmax(-1).masked_fill(~right, 0.0) * share).sum(-1)
        self.sums += torch.stack([right.gather(1, best).any(-1).sum(), (loss * counted).sum()])
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        row = torch.stack([torch.ones_like(confidence), confidence, hit.float()], dim=1)
        self.bins.index_add_(0, place, (row * counted[:, None]).double())
        return probability

    def result(self, left_out: int, world: World) -> Result:
        """The numbers over all ranks. Collective."""
        matrix = world.sum(self.confusion).view(self.classes, self.classes).cpu()
        passed = torch.tensor([left_out], dtype=torch.float64, device=self.sums.device)
        hits, loss, lost = world.sum(torch.cat([self.sums, passed])).tolist()
        bins = world.sum(self.bins).cpu()
        count = int(matrix.sum())
        if not count:
            raise ConfigError("data.val", "", f"none of its {lost:.0f} images is usable", "see `halfseen shards check`")
        top1 = int(matrix.diagonal().sum()) / count
        return Result(count, top1, hits / count, loss / count, matrix, int(lost), bins)


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
            raise AnotherRank("another rank could not read its evaluation images; that rank's message says why")
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
    position. With task.keep_best, best.safetensors holds the weights of the best one, the averages if they were better.
    """

    def __init__(self, config: Any, folder: Path, batch: int, world: World) -> None:
        self.config, self.batch, self.world = config, batch, world
        self.path, self.best = folder / "evaluation.json", folder / BEST
        self.prepare = Normalise(config, world.device)

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> dict[str, float]:
        gallery = Gallery(MISTAKES, self.config.augment.mean, self.config.augment.std) if self.world.main else None
        result = self.evaluate(engine, gallery)
        values = result.scalars("val")
        monitor.note(f"evaluated {position:,} images: {result}")
        if self.config.engine.ema:
            with engine.averaged():
                averaged = self.evaluate(engine)
            values |= averaged.scalars("val_ema")
            monitor.note(f"  averaged weights: {averaged}")
        monitor.picture(position, "val/confusion", confusion_picture(result.confusion))
        if gallery and gallery.worst:
            monitor.picture(position, "val/mistakes", gallery.picture())
        better = self.record(position, result.count, values) if self.world.main else False
        if self.config.task.keep_best and self.world.largest(int(better)):
            self.keep(engine.weights(ema=values.get("val_ema/top1", 0.0) > values["val/top1"]))
        return values

    def evaluate(self, engine: Engine, sink: Sink | None = None) -> Result:
        """Every image of the evaluation set once."""
        batches = open_val(self.config, self.batch, self.world)
        return evaluate(engine, batches, self.prepare, self.config.data.classes, self.world, sink=sink)

    def record(self, position: int, count: int, values: dict[str, float]) -> bool:
        """Add an evaluation to the file, in one move; whether it is the best so far."""
        earlier = json.loads(self.path.read_text())["evaluations"] if self.path.exists() else []
        listed = [entry for entry in earlier if entry["position"] < position]
        listed.append({"position": position, "images": count, **values})
        best = max(listed, key=lambda entry: max(entry["val/top1"], entry.get("val_ema/top1", 0.0)))
        content = {"best": best, "last": listed[-1], "evaluations": listed}
        write_whole(self.path, json.dumps(content, indent=2) + "\n")
        return best is listed[-1]

    def keep(self, weights: dict[str, Tensor]) -> None:
        """Write the weights, which only rank 0 has, in one move."""
        if self.world.main:
            partial = self.best.with_suffix(".partial")
            save_file(weights, partial, {"config": to_yaml(self.config)})  # so the file says itself what it is
            os.replace(partial, self.best)
