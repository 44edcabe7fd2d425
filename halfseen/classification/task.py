"""What a classification stage learns: the head, the loss, what trains."""

from dataclasses import dataclass
from typing import Literal

from halfseen.config import ConfigError, at_least, between, positive


@dataclass
class Task:
    """Classification: what the head reads, what the loss is, what trains. Classes come from data.classes."""

    pool: Literal["class", "mean"] = "mean"  # class: that token after the final norm; mean: of patches
    loss: Literal["ce", "bce"] = "ce"  # ce: soft-target cross entropy; bce: binary per class (DeiT III)
    smoothing: float = 0.1  # share of the target spread over all classes; needs loss=ce
    head_std: float = 2e-5  # standard deviation of the new head's weights
    train: Literal["all", "head"] = "all"  # head: the trunk is frozen and runs in evaluation mode
    mix_stride: int = 0  # mixup and cutmix pair the images at p and p + stride; 0: from run.global_batch

    def check(self, key: str) -> None:
        """Ranges, and smoothing that binary targets would turn into noise."""
        between(f"{key}.smoothing", self.smoothing, 0.0, 0.999)
        positive(f"{key}.head_std", self.head_std)
        at_least(f"{key}.mix_stride", self.mix_stride, 0)
        if self.loss == "bce" and self.smoothing:
            raise ConfigError(
                f"{key}.smoothing",
                self.smoothing,
                "loss=bce takes every class above 0 for present, so smoothing would mark all of them",
                f"set {key}.smoothing=0, or {key}.loss=ce",
            )
