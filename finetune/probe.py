"""Probes: how good are frozen features? ``halfseen probe linear|attentive|knn WEIGHTS key=value ...``."""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfseen import data, distributed, engines, opening, optim, origin, stage
from halfseen.classification import knn
from halfseen.classification.evaluation import Normalise, Score, Share, in_step, open_val
from halfseen.config import ConfigError
from halfseen.data.transforms import evaluation_transform, resize
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.models.norm import BatchNorm
from halfseen.models.trunks import Trunk, trunk_of
from halfseen.monitor import Monitor
from halfseen.recipes import load
from halfseen.writing import write_whole

from .probe_config import Heads, Probe

SCHEMA = Probe
# An attentive probe has more to learn than a linear one, and no published recipe of MAE's.
ATTENTIVE = {
    "optim": {"name": "adamw", "base_lr": 5e-4, "betas": [0.9, 0.999], "weight_decay": 0.05, "warmup": "2ep"},
    "run": {"images": "20ep", "global_batch": 1024, "checkpoint_every": "5ep"},
}


def main(argv: Sequence[str]) -> int:
    """``halfseen probe linear|attentive|knn WEIGHTS key=value ...``; returns the exit code. Works under torchrun."""
    parser = argparse.ArgumentParser(prog="halfseen probe", description=__doc__)
    parser.add_argument("kind", choices=["linear", "attentive", "knn"])
    parser.add_argument("weights", type=Path, help="a run (pretraining or fine-tuning), a checkpoint, or a weight file")
    parser.add_argument("overrides", nargs="*", help="options: `halfseen recipes --fields probe`")
    parser.add_argument("--k", default="10,20,100,200", help="knn: numbers of neighbours (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.07, help="knn: of the votes (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="knn: images per forward pass and rank (default 256)")
    parser.add_argument("--json", type=Path, help="knn: write the numbers to this file")
    arguments = parser.parse_intermixed_args(argv)
    config = config_of(arguments.kind, arguments.weights, arguments.overrides)
    if arguments.kind == "knn":
        return neighbours(config, arguments)
    opened = opening.open_config(SCHEMA, config)
    with distributed.started(config.engine.device) as world:
        made = parts(config, world, opened.folder)
        stage.announce(config, opened.folder, made, world)
        evaluate = Evaluations(config, opened.folder, made.batches.micro, world) if config.data.val else None
        outcome = stage.run(opened, made, world, evaluate=evaluate)
    return stage.exit_code(outcome)


def config_of(kind: str, weights: Path, overrides: Sequence[str]) -> Probe:
    """The probe's config: the trunk and the data of the run that made the weights, then the user's options."""
    sections: list[dict[str, Any]] = [ATTENTIVE] if kind == "attentive" else []
    if not weights.exists():
        raise ConfigError("weights", str(weights), "there is no such file or folder", "check the path")
    found = origin.of(weights)
    if found is not None:
        sections.append({**origin.inherited((), found.said), "data": found.said.get("data") or {}})
    sections.append({"probe": {"kind": "linear" if kind == "knn" else kind}})
    config = load(Probe, None, overrides, sections)
    config.run.init = config.run.init or str(weights)
    where = weights / f"probe_{kind}" if weights.is_dir() else Path("runs") / f"probe_{kind}_{weights.stem}"
    config.run.folder = config.run.folder or str(where)
    return config


# ------------------------------------------------------------------------------------------------ the student


class Probed(nn.Module):
    """A frozen trunk, normalised features, and several heads that train side by side without touching each other.

    forward(batch) takes image float [B, 3, S, S] and target int64 [B]; it returns the sum of the heads' losses, so that
    each has its own gradient, and the best head's loss. With task="predict" it returns logits [B, heads, K] and
    features [B, D], pooled and not normalised.
    """

    def __init__(self, encoder: Trunk, cfg: Heads, classes: int) -> None:
        super().__init__()
        self.cfg, self.classes = cfg, classes
        self.encoder = encoder.requires_grad_(False)
        self.norm = BatchNorm(encoder.width, affine=False, eps=1e-6)
        make = Attentive if cfg.kind == "attentive" else Linear
        self.heads = nn.ModuleList(make(encoder.width, classes, cfg) for _ in cfg.rates)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        with torch.no_grad():
            tokens = self.encoder(batch["image"])
            pooled = tokens[:, 0] if self.cfg.pool == "class" else tokens[:, self.encoder.prefix :].mean(1)
        given = self.norm((tokens if self.cfg.kind == "attentive" else pooled).float())
        logits = torch.stack([head(given).float() for head in self.heads], dim=1)
        if batch.get("task", "train") == "predict":
            return {"logits": logits, "features": pooled}
        losses = torch.stack([F.cross_entropy(part, batch["target"]) for part in logits.unbind(1)])
        return {"loss": losses.sum(), "best_loss": losses.detach().min()}

    def train(self, mode: bool = True) -> "Probed":
        """The trunk is never in training mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """Units to shard and compile."""
        return list(self.encoder.blocks)

    def train_flops_per_image(self) -> float:
        """One forward of the trunk."""
        return self.encoder.flops()

    def groups(self, cfg: Any) -> list[optim.Group]:
        """A group per head, at its own rate."""
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        return [
            optim.Group(
                f"rate_{rate:g}",
                [name for name in names if name.startswith(f"heads.{number}.")],
                rate,
                cfg.weight_decay,
            )
            for number, rate in enumerate(self.cfg.rates)
        ]


class Linear(nn.Linear):
    """One linear map: [B, D] -> [B, K]."""

    def __init__(self, width: int, classes: int, cfg: Heads) -> None:
        super().__init__(width, classes)
        nn.init.trunc_normal_(self.weight, std=cfg.std)
        nn.init.zeros_(self.bias)


class Attentive(nn.Module):
    """A learned query attends to all tokens [B, N, D]; what it gathers is classified linearly: -> [B, K]."""

    def __init__(self, width: int, classes: int, cfg: Heads) -> None:
        super().__init__()
        if width % cfg.heads:
            raise ConfigError("probe.heads", cfg.heads, f"does not divide the width {width}", "use a divisor")
        self.heads = cfg.heads
        self.query = nn.Parameter(torch.empty(1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.head = Linear(width, classes, cfg)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        key, value = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.query.unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(len(tokens), -1, -1, -1)
        return self.head(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1))


# ------------------------------------------------------------------------------------------------ the stage


def parts(config: Probe, world: World, folder: Path) -> stage.Parts:
    """What this stage trains, on which data, prepared how."""
    stage.seed_weights(config.run.seed)
    student = Probed(trunk_of(config), config.probe, config.data.classes)
    train_set = data.open_set(config.data, "train")
    batches, spans = stage.derive(config, train_set, world)
    normalise = Normalise(config, world.device)
    crop = Crop(config.augment.crop_scale, config.augment.crop_ratio, config.augment.flip, config.data.image_size)

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        made = normalise(batch)
        return {"image": made["image"], "target": made["label"]}

    stream = stage.stream(config, train_set, crop, batches, world, folder)
    return stage.Parts(student, train_set, batches, spans, stream, prepare, groups=student.groups(config.optim))


@dataclass(frozen=True)
class Crop:
    """BYOL's random crop, as MAE's linear probe has it: one draw, cut to the image where it does not fit; and flip."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    side: int

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, S, S]."""
        _, height, width = image.shape
        area = height * width * rng.uniform(*self.scale)
        shape = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        wide = max(1, min(round(math.sqrt(area * shape)), width))
        tall = max(1, min(round(math.sqrt(area / shape)), height))
        top, left = rng.randrange(height - tall + 1), rng.randrange(width - wide + 1)
        image = resize(image[:, top : top + tall, left : left + wide], (self.side, self.side))
        return image.flip(2) if rng.random() < self.flip else image


class Evaluations:
    """Top-1 of every head over the evaluation set, in one pass; the best one's rate. Writes probe.json."""

    def __init__(self, config: Probe, folder: Path, batch: int, world: World) -> None:
        self.config, self.path, self.batch, self.world = config, folder / "probe.json", batch, world
        self.prepare = Normalise(config, world.device)

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> dict[str, float]:
        rates, classes = self.config.probe.rates, self.config.data.classes
        scores = [Score(classes, None, self.world.device) for _ in rates]
        share = Share(open_val(self.config, self.batch, self.world), self.prepare)
        for batch, counts in in_step(share, self.world):
            logits = engine.predict({"image": batch["image"]})["logits"].float()
            right = F.one_hot(batch["label"], classes).bool()
            for number, score in enumerate(scores if counts else ()):
                score.add(logits[:, number], right)
        found = {rate: score.result(share.left_out, self.world) for rate, score in zip(rates, scores)}
        best = max(found, key=lambda rate: found[rate].top1)
        monitor.note(f"evaluated {position:,} images: at {best:g} x the rate, {found[best]}")
        values = {f"val/top1_{rate:g}": result.top1 for rate, result in found.items()}
        values |= {"val/top1": found[best].top1, "val/top5": found[best].top5}
        if self.world.main:
            write_whole(self.path, json.dumps({"position": position, "best_rate": best, **values}, indent=1) + "\n")
        return values


# ------------------------------------------------------------------------------------------------ neighbours


def neighbours(config: Probe, arguments: argparse.Namespace) -> int:
    """Weighted nearest neighbours of the evaluation set among the training set, both seen through the centre crop."""
    ks = [int(part) for part in arguments.k.split(",")]
    student = Probed(trunk_of(config), config.probe, config.data.classes)
    stage.initialise(student, config, World())
    with distributed.started(config.engine.device) as world:
        engine = engines.create(config.engine, student, config.optim, student.groups(config.optim), world, 0)
        bank, test = (seen(config, which, arguments.batch, engine, world) for which in ("train", "val"))
        found = knn.top1(bank, test, config.data.classes, ks, arguments.temperature)
        if world.main:
            print(f"knn       {len(test[1]):,} images among {len(bank[1]):,}, temperature {arguments.temperature}")
            for k, share in found.items():
                print(f"  k={k:<5} top-1 {share:.2%}")
            if arguments.json:
                arguments.json.write_text(json.dumps({str(k): share for k, share in found.items()}) + "\n")
    return 0


def seen(config: Probe, which: str, batch: int, engine: Engine, world: World) -> tuple[Tensor, Tensor]:
    """Unit features float32 [n, D] and labels int64 [n] of the whole training or evaluation set. Collective."""
    batches = data.evaluation_batches(
        data.open_set(config.data, which),
        config.data,
        evaluation_transform(config.data.image_size, config.data.eval_crop),
        rank=world.rank,
        world=world.world,
        batch=batch,
    )
    prepare = Normalise(config, world.device)
    return knn.features(lambda made: engine.predict({"image": made["image"]})["features"], batches, prepare, world)
