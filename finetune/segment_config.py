"""Options of semantic segmentation: the shared sections plus the head."""

from dataclasses import dataclass, field
from typing import Literal

from halfseen import selection
from halfseen.config import Augment, ConfigError, Data, Model, Monitor, Optim, Run, between, positive
from halfseen.engine_config import Engine


@dataclass
class Pixels:
    """What reads the trunk, and what its classes are."""

    head: Literal["linear", "pyramid"] = "pyramid"  # linear: one map of the last tokens; pyramid: four depths, merged
    width: int = 256  # channels of the pyramid
    zero_is_nothing: bool = False  # masks count from 1, and 0 is no class (ADE20K); else 255 is no class
    scale: tuple[float, float] = (0.5, 2.0)  # random resizing before the crop: lowest and highest
    stride: float = 2 / 3  # evaluation: from one square window of the picture to the next, over the window's side
    train: str = "all"  # what trains in the trunk: all, attention, head, ... (see docs/finetuning.md)

    def check(self, key: str) -> None:
        """Ranges."""
        positive(f"{key}.width", self.width)
        selection.check(f"{key}.train", self.train)
        if "lora" in self.train:
            raise ConfigError(f"{key}.train", self.train, "only the classifier has low-rank maps", "train another part")
        between(f"{key}.stride", self.stride, 0.01, 1.0)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"{key}.scale", self.scale, "is not 0 < low <= high", "e.g. [0.5, 2.0]")


@dataclass
class Segment:
    """A segmentation run. Defaults are a short schedule of ours; the published ones use UPerNet and 160,000 steps."""

    stage: Literal["segment"] = "segment"
    model: Model = field(default_factory=lambda: Model(drop_path=0.1))
    data: Data = field(default_factory=lambda: Data(label="seg.png", image_size=512))
    augment: Augment = field(default_factory=Augment)
    pixels: Pixels = field(default_factory=Pixels)
    optim: Optim = field(
        default_factory=lambda: Optim(
            base_lr=None, lr=1e-4, warmup="1ep", betas=(0.9, 0.999), decay_tokens=False, layer_decay=0.65
        )
    )
    engine: Engine = field(default_factory=Engine)
    run: Run = field(default_factory=lambda: Run(images="60ep", global_batch=16, checkpoint_every="5ep"))
    monitor: Monitor = field(default_factory=Monitor)

    def check(self, key: str) -> None:
        """Combinations of sections that make no sense together."""
        if not 2 <= self.data.classes <= 254:
            raise ConfigError("data.classes", self.data.classes, "masks hold 2 to 254 classes", "e.g. 150")
        if self.data.label in ("none", "folder", "cls"):
            raise ConfigError("data.label", self.data.label, "names no mask", "the mask's extension, e.g. seg.png")
        others = ("mixup", "cutmix", "erase", "randaugment", "jitter", "three_augment", "simple_crop")
        self.augment.refuse(others, "pixels are only scaled, cropped and flipped")
