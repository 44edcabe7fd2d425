"""Semantic segmentation: a small head on the trunk, trained over pictures with masks, judged by mean IoU."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfseen import data, distributed, opening, selection, stage
from halfseen.classification.evaluation import Share, in_step
from halfseen.config import ConfigError
from halfseen.data.pairs import NOTHING, JointCrop, Pairs, ShortSide
from halfseen.data.transforms import normalise
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.models import ViT
from halfseen.monitor import Monitor
from halfseen.optim import trunk_layers
from halfseen.writing import write_whole

from .segment_config import Pixels, Segment

SCHEMA = Segment


def main(argv: Sequence[str]) -> int:
    """``halfseen segment RECIPE_OR_RUN key=value ...``; returns the exit code."""
    opened = opening.open_run(SCHEMA, argv)
    config, folder = opened.config, opened.folder
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, folder)
        stage.announce(config, folder, made, world)
        if world.main:
            print(f"trains    {selection.describe(made.student, config.pixels.train)}", flush=True)
        evaluate = Evaluations(config, folder, world) if config.data.val else None
        outcome = stage.run(opened, made, world, evaluate=evaluate)
    return stage.exit_code(outcome)


def parts(config: Segment, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how; ``halfseen replay`` needs no more."""
    stage.seed_weights(config.run.seed)
    student = Segmenter(ViT(config.model, config.data.image_size), config.pixels, config.data.classes)
    train_set = data.open_set(config.data, "train")
    batches, spans = stage.derive(config, train_set, world)
    crop = JointCrop(config.data.image_size, config.pixels.scale, config.augment.flip)

    stream = stage.stream(config, train_set, crop, batches, world, folder, images=Pairs)
    prepare = Prepare(config, world.device)
    return stage.Parts(student, train_set, batches, spans, stream, prepare, student.layer_of, student.layers())


# ------------------------------------------------------------------------------------------------ the student


class Segmenter(nn.Module):
    """A trunk and a head that names every pixel.

    forward(batch) takes image float [B, 3, S, S] and target int64 [B, S, S] (NOTHING where no class counts); it returns
    the mean cross entropy over pixels. With task="predict" it returns logits [B, K, S, S].
    """

    def __init__(self, encoder: ViT, cfg: Pixels, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        depth = encoder.depth
        # The last block of each quarter of the depth, as BEiT and ViT-Adapter's baselines read a plain trunk.
        self.read = [depth * part // 4 - 1 for part in (1, 2, 3, 4)] if cfg.head == "pyramid" else [depth - 1]
        if cfg.head == "pyramid" and depth < 4:
            raise ConfigError("pixels.head", cfg.head, f"reads four depths of a trunk of {depth} blocks", "linear")
        encoder.norm = nn.Identity()  # the head reads blocks, each with a norm of its own
        self.head = (
            Pyramid(encoder.width, cfg.width, classes) if cfg.head == "pyramid" else Single(encoder.width, classes)
        )
        selection.freeze(self, cfg.train)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        layers = self.encoder.trace(batch["image"], layers=self.read).layers
        maps = [self._map(layers[block]) for block in self.read]
        size = batch["image"].shape[2:]
        logits = F.interpolate(self.head(maps).float(), size, mode="bilinear", align_corners=False)
        if batch.get("task", "train") == "predict":
            return {"logits": logits}
        target = batch["target"]
        # A mean that is 0, not NaN, where every pixel is of no class.
        loss = F.cross_entropy(logits, target, ignore_index=NOTHING, reduction="sum")
        counted = (target != NOTHING).sum()
        hits = ((logits.detach().argmax(1) == target) & (target != NOTHING)).sum()
        return {"loss": loss / counted.clamp(min=1), "accuracy": hits / counted.clamp(min=1)}

    def _map(self, tokens: Tensor) -> Tensor:
        """Tokens [B, prefix + N, D] to the patches as [B, h, w, D]."""
        return tokens[:, self.encoder.prefix :].unflatten(1, self.encoder.grid)

    def train(self, mode: bool = True) -> "Segmenter":
        """What is frozen stays as it is (see selection.still)."""
        super().train(mode)
        selection.still(self)
        return self

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return list(self.encoder.blocks)

    def train_flops_per_image(self) -> float:
        """Three forwards of the trunk; the head is small beside it."""
        return 3 * self.encoder.flops()

    def layers(self) -> int:
        """The id of the last layer (the head): ids run from 0 to this."""
        return len(self.encoder.blocks) + 1

    def layer_of(self, name: str) -> int:
        """A parameter's layer: embeddings 0, block i is i + 1, the head last."""
        return trunk_layers(len(self.encoder.blocks))(name)


class Single(nn.Module):
    """A norm and one linear map of each patch: the linear probe of segmentation."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The last of maps [B, h, w, D] -> [B, K, h, w]."""
        return self.out(self.norm(maps[-1])).movedim(-1, 1)


class Pyramid(nn.Module):
    """Four depths of a plain trunk at 4, 2, 1 and 1/2 times its grid, summed at 4 times, as in semantic FPN.

    Kirillov et al., 2019, on the four scales that BEiT makes of a plain ViT; GroupNorm, so that ranks need not meet.
    """

    SCALES = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.SCALES)
        self.laterals = nn.ModuleList(nn.Linear(width, channels) for _ in self.SCALES)
        self.smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in self.SCALES)
        self.norm = nn.GroupNorm(1, channels)
        self.out = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps [B, h, w, D], from early to late -> [B, K, 4h, 4w]."""
        height, width = maps[0].shape[1:3]
        total: Tensor | None = None
        for scale, norm, lateral, smooth, given in zip(self.SCALES, self.norms, self.laterals, self.smooths, maps):
            level = lateral(norm(given)).movedim(-1, 1)
            size = (max(1, int(height * scale)), max(1, int(width * scale)))
            level = smooth(F.interpolate(level, size, mode="bilinear", align_corners=False))
            level = F.interpolate(level, (4 * height, 4 * width), mode="bilinear", align_corners=False)
            total = level if total is None else total + level
        assert total is not None
        return self.out(F.gelu(self.norm(total)))


class Prepare:
    """Micro-batch from the loader to what the student trains on, on the device."""

    def __init__(self, config: Segment, device: torch.device) -> None:
        self.config, self.device = config, device

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds target int64 [B, S, S]; raises ConfigError for a class beyond data.classes."""
        mask, classes, from_one = batch["view"][:, 0], self.config.data.classes, self.config.pixels.zero_is_nothing
        wrong = mask[(mask >= min(classes + from_one, NOTHING)) & (mask != NOTHING)]
        if len(wrong):
            raise ConfigError("data.classes", classes, f"a mask holds {wrong[0].item()}", "count the classes")
        # As the loader made it: bytes, and in pinned memory beside a GPU.
        target = mask.to(self.device, non_blocking=True).long()
        if from_one:
            target = torch.where((target == 0) | (target == NOTHING), NOTHING, target - 1)
        image = batch["image"].to(self.device, non_blocking=True)
        image = normalise(image, self.config.augment.mean, self.config.augment.std)
        return {"image": image, "target": target}


# ------------------------------------------------------------------------------------------------ mean IoU


@dataclass(frozen=True)
class Overlap:
    """What an evaluation found, from a confusion matrix of pixels int64 [K, K]: row true, column predicted."""

    confusion: Tensor

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 [K]; NaN for a class that is nowhere."""
        hits = self.confusion.diagonal().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def scalars(self) -> dict[str, float]:
        """The numbers a monitor shows."""
        accuracy = self.confusion.diagonal().sum().double() / self.confusion.sum()
        return {"val/mean_iou": float(self.iou.nanmean()), "val/pixel_accuracy": float(accuracy)}


class Evaluations:
    """Mean IoU over the evaluation set, each picture once on any number of ranks; writes evaluation.json.

    The shorter side of a picture becomes data.image_size; a square window of that size slides over it, scores are
    averaged where windows overlap, and classes are compared at the size of the mask.
    """

    def __init__(self, config: Segment, folder: Path, world: World) -> None:
        self.config, self.path, self.world = config, folder / "evaluation.json", world
        self.prepare = Prepare(config, world.device)

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> dict[str, float]:
        result = self.evaluate(engine)
        values = result.scalars()
        shown = "  ".join(f"{name.removeprefix('val/')} {value:.2%}" for name, value in values.items())
        monitor.note(f"evaluated {position:,} images: {shown}")
        if self.world.main:
            iou = [None if value != value else value for value in result.iou.tolist()]
            write_whole(self.path, json.dumps({"position": position, **values, "iou": iou}, indent=1) + "\n")
        return values

    def evaluate(self, engine: Engine) -> Overlap:
        """Every picture of the evaluation set once. Collective."""
        classes, device = self.config.data.classes, self.world.device
        confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        batches = data.evaluation_batches(
            data.open_set(self.config.data, "val"),
            self.config.data,
            ShortSide(self.config.data.image_size),
            rank=self.world.rank,
            world=self.world.world,
            batch=1,  # since each picture has its own shape
            images=Pairs,
        )
        side, stride = self.config.data.image_size, round(self.config.data.image_size * self.config.pixels.stride)
        for batch, counts in in_step(Share(batches, self.prepare), self.world):
            logits = slide(lambda windows: engine.predict({"image": windows})["logits"], batch["image"], side, stride)
            if counts:
                target = batch["target"]
                named = named_at(logits, target.shape[1:])
                counted = target != NOTHING
                place = torch.where(counted, target, 0) * classes + named
                confusion.index_add_(0, place.flatten(), counted.flatten().long())
        return Overlap(self.world.sum(confusion).view(classes, classes).cpu())


def slide(predict: Callable[[Tensor], Tensor], image: Tensor, side: int, stride: int) -> Tensor:
    """Scores [1, K, h, w] of a picture [1, 3, h, w]: the mean over square windows, all of them in one prediction.

    predict: windows [n, 3, side, side] to scores [n, K, side, side]. Ranks predict equally often, whatever their
    pictures' shapes are. As mmsegmentation's slide_inference: the last window of a row ends at the border.
    """
    down, across = (starts(length, side, stride) for length in image.shape[2:])
    places = [(top, left) for top in down for left in across]
    scores = predict(torch.cat([image[:, :, top : top + side, left : left + side] for top, left in places])).float()
    total = scores.new_zeros(1, scores.shape[1], *image.shape[2:])
    count = scores.new_zeros(1, 1, *image.shape[2:])
    for (top, left), one in zip(places, scores):
        total[0, :, top : top + side, left : left + side] += one
        count[0, :, top : top + side, left : left + side] += 1
    return total / count


def starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows of a side begin on a length that is no shorter."""
    return [min(first, length - side) for first in range(0, length - side + stride, stride)]


def named_at(scores: Tensor, size: Sequence[int], most: int = 16) -> Tensor:
    """The likeliest class int64 [1, H, W] at a size, of scores [1, K, h, w] made larger, ``most`` classes at a time."""
    best, named = None, None
    for first in range(0, scores.shape[1], most):
        part = F.interpolate(scores[:, first : first + most], tuple(size), mode="bilinear", align_corners=False)
        value, place = part.max(1)
        if best is None or named is None:
            best, named = value, place
        else:
            named = torch.where(value > best, place + first, named)
            best = torch.maximum(best, value)
    assert named is not None, "there are classes"
    return named
