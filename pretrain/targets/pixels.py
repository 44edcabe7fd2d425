"""MAE's target: the pixels of hidden patches."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.config import Augment

from ..collapse import variances
from ..patches import patchify, standardise
from ..pictures import triplets
from .average import average


class Pixels:
    """The pixels of each patch, if asked relative to that patch's own mean and deviation.

    One of a family, see pretrain/targets: width numbers are predicted per patch. error: mean "square" (MAE) or
    "absolute" error (SimMIM).
    """

    def __init__(self, patch: int, normalise: bool, error: Literal["square", "absolute"] = "square") -> None:
        self.patch, self.normalise, self.error = patch, normalise, error
        self.width = patch * patch * 3

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """batch["image"] float [B, 3, h*P, w*P] -> float32 [B, N, P*P*3]."""
        patches = patchify(batch["image"].float(), self.patch)
        return standardise(patches)[0] if self.normalise else patches

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Mean error, and how much patches differ; both [B, M, P*P*3], of hidden patches alone."""
        curves = variances(prediction, target)
        if weight is None:
            measure = F.mse_loss if self.error == "square" else F.l1_loss
            return {"loss": measure(prediction.float(), target.float())} | curves
        apart = prediction.float() - target.float()
        apart = apart.square() if self.error == "square" else apart.abs()
        return {"loss": average(apart.mean(-1), weight)} | curves

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """Masked, reconstructed and original images, uint8 [3, height, width]."""
        return triplets(
            batch["image"], batch["mask"], prediction, self.patch, self.normalise, augment.mean, augment.std
        )
