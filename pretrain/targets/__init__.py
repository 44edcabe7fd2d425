"""What a student must predict of each patch, made outside the student and without gradients.

A target is an object with

- ``width``: how many numbers a student predicts per patch;
- ``target(batch)``: the right answer for every patch, [B, N, ...], from batch["image"] (normalised, float
  [B, 3, H, W]) and the other entries of the batch;
- ``target.loss(prediction, answer)``: prediction [..., width] and answers [..., ...] of the patches that count ->
  {"loss": scalar, and further scalars worth a curve}. Students call it, so it has no state and no weights that train;
- ``target.picture(batch, prediction, augment)``: uint8 [3, height, width], what a person should see of a prediction
  [B, N, width].

Which patches count, and how a prediction is made, is the objective's affair: any target serves any objective.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from halfseen.config import Augment

from .pixels import Pixels

if TYPE_CHECKING:
    from ..config import Pretrain


class Target(Protocol):
    """See the module."""

    width: int

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """The right answers."""

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """How wrong a prediction is."""

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """What a person should see."""


def pixels(config: "Pretrain", device: torch.device) -> Target:
    """MAE's target."""
    return Pixels(config.patch, config.target.normalise)


TARGETS: dict[str, Callable[["Pretrain", torch.device], Target]] = {"pixels": pixels}


def create(config: "Pretrain", device: torch.device) -> Target:
    """The target a config names, with what it needs (a tokenizer, a teacher) on the device."""
    return TARGETS[config.target.name](config, device)
