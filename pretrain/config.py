"""The pretraining stage's options: the shared sections plus the objective."""

from dataclasses import dataclass, field
from typing import Literal

from halfseen.config import Augment, ConfigError, Data, Engine, Model, Monitor, Optim, Run

from .mae import MAEConfig


@dataclass
class Objective:
    """What the student must predict; one section per objective."""

    name: Literal["mae"] = "mae"  # mae: hidden pixels from visible patches
    mae: MAEConfig = field(default_factory=MAEConfig)


@dataclass
class Pretrain:
    """A pretraining run. Defaults are MAE's published recipe for ViT-B (800 epochs)."""

    stage: Literal["pretrain"] = "pretrain"
    model: Model = field(default_factory=lambda: Model(position="sincos"))
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    objective: Objective = field(default_factory=Objective)
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
