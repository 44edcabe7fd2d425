"""What a probe of a frozen trunk is asked for."""

from dataclasses import dataclass, field
from typing import Literal

from halfseen.config import Augment, ConfigError, Data, Model, Monitor, Optim, Run, positive
from halfseen.engine_config import Engine
from halfseen.models.alternet import AlterNetConfig
from halfseen.models.hierarchical import TimmConfig
from halfseen.models.pyramid import PyramidConfig
from halfseen.models.swin import SwinConfig
from halfseen.models.trunks import Kind


@dataclass
class Heads:
    """What is put on the frozen trunk."""

    kind: Literal["linear", "attentive"] = "linear"  # linear: on one vector; attentive: a query attends to all tokens
    pool: Literal["class", "mean"] = "class"  # linear: that token, or the mean of patches; both after the final norm
    rates: list[float] = field(default_factory=lambda: [1.0])  # a head for each, trained at this times the rate
    heads: int = 8  # attention heads of an attentive probe
    std: float = 0.01  # standard deviation of a new head's weights

    def check(self, key: str) -> None:
        """Ranges."""
        positive(f"{key}.heads", self.heads)
        positive(f"{key}.std", self.std)
        if not self.rates or len(set(self.rates)) < len(self.rates) or not min(self.rates) > 0:
            raise ConfigError(f"{key}.rates", self.rates, "is no list of different numbers > 0", "e.g. [0.3,1,3]")


@dataclass
class Probe:
    """A probe. Defaults are MAE's published linear probe (90 epochs, LARS)."""

    stage: Literal["probe"] = "probe"
    trunk: Kind = "vit"  # which section describes the trunk: vit model, the others their own
    model: Model = field(default_factory=Model)
    swin: SwinConfig = field(default_factory=SwinConfig)
    timm: TimmConfig = field(default_factory=TimmConfig)
    alternet: AlterNetConfig = field(default_factory=AlterNetConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=lambda: Augment(crop_scale=(0.08, 1.0)))
    probe: Heads = field(default_factory=Heads)
    optim: Optim = field(
        default_factory=lambda: Optim(name="lars", base_lr=0.1, weight_decay=0.0, warmup="10ep", decay_tokens=False)
    )
    engine: Engine = field(default_factory=Engine)
    run: Run = field(default_factory=lambda: Run(images="90ep", global_batch=16384, checkpoint_every="10ep"))
    monitor: Monitor = field(default_factory=Monitor)

    def check(self, key: str) -> None:
        """Combinations of sections that make no sense together."""
        if self.data.classes < 2:
            raise ConfigError(
                "data.classes", self.data.classes, "a probe needs at least two", "e.g. data.label=cls data.classes=1000"
            )
        if self.data.label == "none":
            raise ConfigError("data.label", "none", "a probe needs labels", "name a member extension, e.g. cls")
        classed = self.trunk == "vit" and self.model.class_token
        if self.probe.kind == "linear" and self.probe.pool == "class" and not classed:
            raise ConfigError("probe.pool", "class", "the trunk has no such token", "probe.pool=mean")
        others = ("mixup", "cutmix", "erase", "randaugment", "jitter", "three_augment", "simple_crop")
        self.augment.refuse(others, "a probe only crops and flips")
