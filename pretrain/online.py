"""A probe beside the pretraining: how well do nearest neighbours name classes, every so many images?"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from halfseen import data
from halfseen.classification import knn
from halfseen.classification.evaluation import Normalise
from halfseen.config import ConfigError, at_least, positive
from halfseen.data.transforms import evaluation_transform
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.monitor import Monitor


@dataclass
class Online:
    """The probe; it runs every run.evaluate_every images on data.val, labelled as data.label and data.classes say."""

    k: int = 0  # neighbours that vote; 0: no probe
    bank: int = 10_000  # training images the neighbours are sought among: the first of each source; 0: all
    temperature: float = 0.07  # of the votes
    pool: Literal["mean", "class"] = "mean"  # of patches, or that token; both after the final norm
    batch: int = 128  # images per forward pass and rank

    def check(self, key: str) -> None:
        """Ranges."""
        at_least(f"{key}.k", self.k, 0)
        at_least(f"{key}.bank", self.bank, 0)
        positive(f"{key}.temperature", self.temperature)
        positive(f"{key}.batch", self.batch)


class Neighbours:
    """Accuracy of weighted nearest neighbours. Draws and trains nothing: the run is the same with and without."""

    def __init__(self, config: Any, student: Any, world: World) -> None:
        refuse(config)
        self.config, self.world = config, world
        self.tokens, self.prefix = student.encoder.tokens, student.encoder.prefix
        self.prepare = Normalise(config, world.device)

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> dict[str, float]:
        online = self.config.online
        bank, test = (self.seen(engine, which) for which in ("train", "val"))
        share = knn.top1(bank, test, self.config.data.classes, [online.k], online.temperature)[online.k]
        monitor.note(f"probed {position:,} images: {online.k} nearest of {len(bank[1]):,} name {share:.2%} rightly")
        return {"probe/knn": share}

    def seen(self, engine: Engine, which: str) -> tuple[Tensor, Tensor]:
        """Unit features float32 [n, D] and labels int64 [n] of the bank or of the evaluation set. Collective."""
        chosen = replace(self.config.data, limit=self.config.online.bank)
        batches = data.evaluation_batches(
            data.open_set(chosen, which),
            chosen,
            evaluation_transform(chosen.image_size, chosen.eval_crop),
            rank=self.world.rank,
            world=self.world.world,
            batch=self.config.online.batch,
        )
        return knn.features(lambda batch: self.pooled(engine, batch["image"]), batches, self.prepare, self.world)

    def pooled(self, engine: Engine, image: Tensor) -> Tensor:
        """One vector per image [B, D], of the whole image: nothing is hidden."""
        mask = torch.zeros(len(image), self.tokens, dtype=torch.bool, device=image.device)
        task = "features" if self.config.objective.name == "mae" else "predict"
        latent = engine.predict({"image": image, "mask": mask}, task)["latent"]
        return latent[:, 0] if self.config.online.pool == "class" else latent[:, self.prefix :].mean(1)


def refuse(config: Any) -> None:
    """Raise ConfigError for a run that cannot be probed."""
    if config.data.label == "none" or config.data.classes < 2 or not config.data.val:
        raise ConfigError(
            "online.k",
            config.online.k,
            "a probe needs labels and an evaluation set; the pretraining itself never sees them",
            "set data.label, data.classes and data.val, or online.k=0",
        )
    if config.objective.name in ("vqkd", "dvae"):
        raise ConfigError("online.k", config.online.k, f"{config.objective.name} trains a tokenizer", "online.k=0")
    if config.online.pool == "class" and not (config.trunk == "vit" and config.model.class_token):
        raise ConfigError("online.pool", "class", "the trunk has no such token", "online.pool=mean")
