"""MAE's target: the pixels of hidden patches."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.config import Augment

from ..patches import patchify, standardise
from ..pictures import triplets


class Pixels:
    """The pixels of each patch, if asked relative to that patch's own mean and deviation; mean squared error.

    One of a family, see pretrain/targets: width numbers are predicted per patch.
    """

    def __init__(self, patch: int, normalise: bool) -> None:
        self.patch, self.normalise = patch, normalise
        self.width = patch * patch * 3

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """batch["image"] float [B, 3, h*P, w*P] -> float32 [B, N, P*P*3]."""
        patches = patchify(batch["image"].float(), self.patch)
        return standardise(patches)[0] if self.normalise else patches

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Mean squared error; both [..., P*P*3], of hidden patches alone."""
        return {"loss": F.mse_loss(prediction.float(), target.float())}

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """Masked, reconstructed and original images, uint8 [3, height, width]."""
        return triplets(
            batch["image"], batch["mask"], prediction, self.patch, self.normalise, augment.mean, augment.std
        )
