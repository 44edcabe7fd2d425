"""What a student must predict of each patch, made outside the student and without gradients.

A target is an object with

- ``width``: how many numbers a student predicts per patch;
- ``target(batch)``: the right answer for every patch, [B, N, ...], from batch["image"] (normalised, float
  [B, 3, H, W]) and the other entries of the batch; None where only the student's own average has the answer;
- ``target.loss(prediction, answer, weight)``: prediction [..., width] and answers [..., ...] of patches that count ->
  {"loss": scalar, and further scalars worth a curve}. weight: how much each of them counts, float32 [...] that sums to
  1; None: all equal (see average.py). Students call it, so it has no state and no weights that train;
- ``target.picture(batch, prediction, augment)``: uint8 [3, height, width], what a person should see of a prediction
  [B, N, width].

Which patches count, and how a prediction is made, is the objective's affair: any target serves any objective.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from halfseen import teachers
from halfseen.config import Augment, ConfigError
from halfseen.models.sizes import resolve

from ..tokenizers import load as load_tokenizer
from .codes import Codes
from .features import Average, Features
from .hog import HOG
from .pixels import Pixels

if TYPE_CHECKING:
    from ..config import Pretrain


class Target(Protocol):
    """See the module."""

    width: int

    def __call__(self, batch: dict[str, Any]) -> Tensor | None:
        """The right answers [B, N, ...]."""

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """How wrong a prediction [..., width] is."""

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """What a person should see: uint8 [3, height, width]."""


def pixels(config: "Pretrain", device: torch.device) -> Target:
    """MAE's target, and SimMIM's."""
    return Pixels(config.patch, config.target.normalise, config.target.error)


def hog(config: "Pretrain", device: torch.device) -> Target:
    """MaskFeat's target."""
    return HOG(config.patch)


def features(config: "Pretrain", device: torch.device) -> Target:
    """A frozen teacher's features."""
    cfg, augment, size = config.target.features, config.augment, config.data.image_size
    statistics = (augment.mean, augment.std)
    teacher = teachers.load(
        cfg.teacher, student=statistics, image_size=size, device=device, key="target.features.teacher"
    )
    prefix = int(config.objective.name == "fd" and config.objective.fd.class_token)
    return Features(teacher, cfg, config.grid, config.patch, torch.zeros(1, 3, size, size, device=device), prefix)


def average(config: "Pretrain", device: torch.device) -> Target:
    """data2vec's target."""
    if config.objective.name != "data2vec":
        reason = "only data2vec asks its own average"
        raise ConfigError("target.name", "average", reason, "use objective.name=data2vec, or another target")
    size = resolve(config.model)
    return Average(config.target.average, size.depth, size.width, config.patch)


def codes(config: "Pretrain", device: torch.device) -> Target:
    """BEiT's target."""
    cfg = config.target.codes
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.heads)
    return Codes(tokenizer, cfg, config.augment, config.data.image_size, config.patch, device)


TARGETS: dict[str, Callable[["Pretrain", torch.device], Target]] = {
    "pixels": pixels,
    "hog": hog,
    "features": features,
    "average": average,
    "codes": codes,
}


def create(config: "Pretrain", device: torch.device) -> Target:
    """The target a config names, with what it needs (a tokenizer, a teacher) on the device."""
    return TARGETS[config.target.name](config, device)
