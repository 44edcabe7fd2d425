"""Feature Distillation (Wei et al., 2022): no mask; every token of the student predicts a frozen teacher's token."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from halfseen.config import ConfigError
from halfseen.models import ViT

from .collapse import feature_rank
from .mim import MIM, MIMConfig
from .targets.features import Features


@dataclass
class FDConfig:
    """Prediction of all tokens by one linear map. What the teacher's tokens go through is target.features."""

    start: Literal["trunk", "beit"] = "beit"  # initial weights: the trunk's own, or BEiT's narrow normal ones
    class_token: bool = True  # predict the teacher's class token too, as published


class FeatureDistillation(MIM):
    """The student: a trunk, a linear head and their loss over all tokens (models/feature_distillation.py).

    forward takes image float [B, 3, S, S] and target [B, 1 + N, D'], the class token first (without it [B, N, D']).
    With task="predict" it returns {"prediction": [B, N, D'], "latent": [B, prefix + N, D]}, of patches alone.
    """

    def __init__(self, encoder: ViT, cfg: FDConfig, target: Features) -> None:
        super().__init__(encoder, MIMConfig(start=cfg.start), 0, target)
        if cfg.class_token and not encoder.cfg.class_token:
            reason = "the student has no class token to predict the teacher's from"
            raise ConfigError("objective.fd.class_token", True, reason, "set it to false, or model.class_token=true")
        self.first = int(cfg.class_token)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.encoder(batch["image"])
        patches = tokens[:, self.encoder.prefix :]
        if batch.get("task") == "predict":
            return {"prediction": self.head(patches), "latent": tokens}
        compared = torch.cat([tokens[:, : self.first], patches], dim=1) if self.first else patches
        scalars = self.criterion(self.head(compared), batch["target"], None)
        return scalars | {"feature_rank": feature_rank(patches.mean(1))}
