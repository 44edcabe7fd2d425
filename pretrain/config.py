"""The pretraining stage's options: the shared sections, and what is hidden, how it is predicted, what is predicted."""

from dataclasses import dataclass, field
from typing import Literal

from halfseen.config import Augment, ConfigError, Data, Engine, Model, Monitor, Optim, Run, positive
from halfseen.models.sizes import resolve
from halfseen.models.vit import grid_of

from .mae import MAEConfig


@dataclass
class Mask:
    """Which patches are hidden: drawn for each image from (seed, position), never stored."""

    kind: Literal["random"] = "random"  # random: every subset of that size equally likely (MAE)
    ratio: float = 0.75  # share of patches hidden; int(N * (1 - ratio)) stay visible
    count: int | None = None  # patches hidden; None: from ratio

    def check(self, key: str) -> None:
        """Ranges."""
        if not 0 < self.ratio < 1:
            raise ConfigError(f"{key}.ratio", self.ratio, "is not between 0 and 1", "e.g. 0.75")
        if self.count is not None:
            positive(f"{key}.count", self.count)

    def hidden(self, tokens: int) -> int:
        """How many of so many patches are hidden. Raises ConfigError unless some are and some are not."""
        hidden = tokens - int(tokens * (1 - self.ratio)) if self.count is None else self.count
        if not 0 < hidden < tokens:
            key, value = ("mask.ratio", self.ratio) if self.count is None else ("mask.count", self.count)
            raise ConfigError(key, value, f"hides {hidden} of {tokens} patches", "leave some visible, hide some")
        return hidden


@dataclass
class Target:
    """What must be predicted of hidden patches (see pretrain/targets)."""

    name: Literal["pixels"] = "pixels"  # pixels: of the patch itself
    normalise: bool = True  # pixels: relative to each patch's own mean and deviation


@dataclass
class Objective:
    """How the student predicts; one section per objective."""

    name: Literal["mae"] = "mae"  # mae: visible patches through the trunk, hidden ones filled in by a decoder
    mae: MAEConfig = field(default_factory=MAEConfig)


@dataclass
class Pretrain:
    """A pretraining run. Defaults are MAE's published recipe for ViT-B (800 epochs)."""

    stage: Literal["pretrain"] = "pretrain"
    model: Model = field(default_factory=lambda: Model(position="sincos"))
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    objective: Objective = field(default_factory=Objective)
    mask: Mask = field(default_factory=Mask)
    target: Target = field(default_factory=Target)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    run: Run = field(default_factory=Run)
    monitor: Monitor = field(default_factory=Monitor)

    def check(self, key: str) -> None:
        """Combinations of sections that make no sense together."""
        if self.augment.mixup or self.augment.cutmix:
            raise ConfigError(
                "augment.mixup", self.augment.mixup, "mixing labels has no meaning in pretraining", "set it to 0"
            )
        if self.augment.randaugment or self.augment.erase:
            raise ConfigError(
                "augment.randaugment",
                self.augment.randaugment,
                "RandAugment and erasing belong to fine-tuning",
                "set augment.randaugment= and augment.erase=0",
            )

    @property
    def patch(self) -> int:
        """Pixels on a patch's side."""
        return resolve(self.model).patch

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across an image."""
        return grid_of(self.data.image_size, self.patch)
