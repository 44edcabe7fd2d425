"""Masked image modelling beside distillation: the student sees a masked image, the teacher the whole one."""

from typing import Any

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError
from halfseen.data.masks import random_mask

from ..mim import Compared
from ..targets import Target
from ..targets.hog import HOG
from ..targets.pixels import Pixels
from .config import Masking


def target_of(cfg: Masking, patch: int) -> Target:
    """What is predicted of each hidden patch."""
    return HOG(patch) if cfg.target == "hog" else Pixels(patch, cfg.normalise, "absolute")


class HiddenPatches(nn.Module):
    """SimMIM's part of a joint student: what stands for hidden patches, and the linear map that predicts them.

    Thrown away after training.
    """

    def __init__(self, cfg: Masking, width: int, tokens: int, target: Target) -> None:
        """width: the trunk's channels; tokens: its patches N."""
        super().__init__()
        self.hidden = round(tokens * cfg.ratio)
        self.visible = tokens - self.hidden
        if not 0 < self.hidden < tokens:
            reason = f"hides {self.hidden} of {tokens} patches"
            raise ConfigError("mim.ratio", cfg.ratio, reason, "leave some visible, hide some")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, target.width)
        for weight in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.weight, self.criterion = cfg.weight, target.loss

    def forward(self, patches: Tensor, batch: dict[str, Any]) -> Tensor:
        """The weighted loss of patches [B, N, D] after the trunk, with the batch's mask and hidden_target."""
        compared = Compared.of(batch["mask"], self.hidden, self.visible, "patch")
        prediction = self.head(compared.rows(patches))
        return self.weight * self.criterion(prediction, compared.rows(batch["hidden_target"]), compared.weight)["loss"]


class Masks:
    """Adds mask and hidden_target to a prepared batch, from (seed, position) and the image as the student has it."""

    def __init__(self, cfg: Masking, seed: int, tokens: int, patch: int) -> None:
        self.seed, self.tokens, self.hidden = seed, tokens, round(tokens * cfg.ratio)
        self.target = target_of(cfg, patch)

    def __call__(self, prepared: dict[str, Any], position: Tensor) -> dict[str, Any]:
        mask = random_mask(self.seed, position.to(prepared["image"].device), self.tokens, self.hidden)
        return prepared | {"mask": mask, "hidden_target": self.target(prepared)}
