"""What a classifier trains on: normalised, erased and mixed images, and soft targets."""

from typing import Any

import torch

from halfseen.derived import Batches

from . import mixing
from .evaluation import Normalise


class Prepare:
    """Micro-batch from the loader to what the classifier trains on, on the device.

    Adds image float32 [B, 3, S, S] normalised, erased and mixed, and target float32 [B, K]; all of it depends
    on (seed, position), the images and their labels alone.
    """

    def __init__(self, config: Any, batches: Batches, device: torch.device) -> None:
        self.config, self.device = config, device
        self.normalise = Normalise(config, device)
        self.mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        if self.mixes:
            self.stride = mixing.resolve_stride(batches.total, config.task.mix_stride)
            mixing.check_split(self.stride, batches, config.data.repeats)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        augment, seed, position = self.config.augment, self.config.run.seed, batch["position"]
        prepared = self.normalise(batch)
        image = mixing.erase(prepared["image"], position, seed=seed, probability=augment.erase)
        target = mixing.soft_targets(prepared["label"], self.config.data.classes, self.config.task.smoothing)
        if self.mixes:
            side = self.config.data.image_size
            mix = mixing.draw(position, seed=seed, stride=self.stride, augment=augment, side=side).to(self.device)
            image, target = mixing.mix_images(image, mix), mixing.mix_targets(target, mix)
        return {"image": image, "target": target}
