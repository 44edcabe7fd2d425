"""The pretraining stage's options: the shared sections, and what is hidden, how it is predicted, what is predicted."""

from dataclasses import dataclass, field
from typing import Literal

from halfseen.config import Augment, ConfigError, Data, Model, Monitor, Optim, Run, positive
from halfseen.engine_config import Engine
from halfseen.models.alternet import AlterNetConfig
from halfseen.models.hierarchical import TimmConfig
from halfseen.models.legality import check_visible_only
from halfseen.models.pyramid import PyramidConfig
from halfseen.models.sizes import resolve
from halfseen.models.swin import SwinConfig
from halfseen.models.trainable import check_trainable
from halfseen.models.trunks import Kind, section_of, stride_of
from halfseen.models.vit import grid_of

from .beit2 import BEiT2Config
from .feature_distillation import FDConfig
from .mae import MAEConfig
from .mim import MIMConfig
from .online import Online
from .targets.codes import CodesConfig
from .targets.features import AverageConfig, FeaturesConfig
from .tokenizers import DVAEConfig, VQKDConfig

# random: every subset of that size equally likely (MAE). block: rectangles, topped up to exactly that many (BEiT v2).
# block_v1: rectangles, at most that many (BEiT). coarse: whole cells (SimMIM). grid: all but one patch of each cell.
# none: nothing is hidden, and every patch counts in the loss.
MaskKind = Literal["random", "block", "block_v1", "coarse", "grid", "none"]


@dataclass
class Mask:
    """Which patches are hidden: drawn for each image from (seed, position), never stored."""

    kind: MaskKind = "random"  # random subsets, rectangles (block), cells (coarse, grid), or none: all patches count
    ratio: float = 0.75  # share of patches hidden; int(N * (1 - ratio)) stay visible; coarse: of cells, rounded up
    count: int | None = None  # patches hidden, instead of ratio; not for coarse and grid
    cell: int = 32  # coarse, grid: pixels on a cell's side
    min_block: int = 16  # block: patches of the smallest rectangle tried
    max_block: int | None = None  # block: patches of the largest; None: as many as are still to be hidden
    min_aspect: float = 0.3  # block: lowest height over width of a rectangle; its inverse is the highest

    def check(self, key: str) -> None:
        """Ranges."""
        if not 0 < self.ratio < 1:
            raise ConfigError(f"{key}.ratio", self.ratio, "is not between 0 and 1", "e.g. 0.75")
        if not 0 < self.min_aspect <= 1:
            raise ConfigError(f"{key}.min_aspect", self.min_aspect, "is not within 0 .. 1", "e.g. 0.3")
        for name in ("count", "cell", "min_block", "max_block"):
            if getattr(self, name) is not None:
                positive(f"{key}.{name}", getattr(self, name))
        if self.max_block is not None and self.max_block < self.min_block:
            reason = f"is less than {key}.min_block={self.min_block}, so that no rectangle fits"
            raise ConfigError(f"{key}.max_block", self.max_block, reason, "make it larger, or min_block smaller")

    def hidden(self, tokens: int) -> int:
        """How many of so many patches ratio or count hide. Raises ConfigError unless some are and some are not."""
        hidden = tokens - int(tokens * (1 - self.ratio)) if self.count is None else self.count
        if not 0 < hidden < tokens:
            key, value = ("mask.ratio", self.ratio) if self.count is None else ("mask.count", self.count)
            raise ConfigError(key, value, f"hides {hidden} of {tokens} patches", "leave some visible, hide some")
        return hidden


# pixels: of the patch itself (MAE, SimMIM). hog: histograms of gradients (MaskFeat). features: of a frozen teacher
# (EVA, MVP, Feature Distillation). average: outputs of the student's own averaged weights (data2vec). codes: a frozen
# tokenizer's (BEiT).
TargetName = Literal["pixels", "hog", "features", "average", "codes"]


@dataclass
class Target:
    """What must be predicted of hidden patches (see pretrain/targets)."""

    name: TargetName = "pixels"  # pixels, hog (gradients), features (a teacher's), average (own), codes (a tokenizer's)
    normalise: bool = True  # pixels: relative to each patch's own mean and deviation
    error: Literal["square", "absolute"] = "square"  # pixels: what is averaged (MAE's; SimMIM's)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)


# mae: visible patches through the trunk, hidden ones filled in by a decoder. mim: all tokens through the trunk, hidden
# ones replaced, and one linear map (BEiT, SimMIM, MaskFeat). fd: nothing hidden, the class token predicted too (Feature
# Distillation). data2vec: mim that learns from its own average. beit2: mim that predicts once more through the class
# token. vqkd, dvae: tokenizers, of which target.name=codes makes targets.
ObjectiveName = Literal["mae", "mim", "fd", "data2vec", "beit2", "vqkd", "dvae"]


@dataclass
class Objective:
    """How the student predicts; one section per objective."""

    name: ObjectiveName = "mae"  # mae: encode visible patches, decode the others; mim: mask tokens among all tokens
    mae: MAEConfig = field(default_factory=MAEConfig)
    mim: MIMConfig = field(default_factory=MIMConfig)  # of mim and data2vec
    fd: FDConfig = field(default_factory=FDConfig)
    beit2: BEiT2Config = field(default_factory=BEiT2Config)
    vqkd: VQKDConfig = field(default_factory=VQKDConfig)
    dvae: DVAEConfig = field(default_factory=DVAEConfig)


@dataclass
class Pretrain:
    """A pretraining run. Defaults are MAE's published recipe for ViT-B (800 epochs)."""

    stage: Literal["pretrain"] = "pretrain"
    trunk: Kind = "vit"  # which section describes the trunk: vit model, others their own (those with objective mim)
    model: Model = field(default_factory=lambda: Model(position="sincos"))
    swin: SwinConfig = field(default_factory=SwinConfig)
    timm: TimmConfig = field(default_factory=TimmConfig)
    alternet: AlterNetConfig = field(default_factory=AlterNetConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    objective: Objective = field(default_factory=Objective)
    mask: Mask = field(default_factory=Mask)
    target: Target = field(default_factory=Target)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    run: Run = field(default_factory=Run)
    online: Online = field(default_factory=Online)
    monitor: Monitor = field(default_factory=Monitor)

    def check(self, key: str) -> None:
        """Combinations of sections that make no sense together."""
        self.augment.refuse(("mixup", "cutmix"), "mixing labels has no meaning in pretraining")
        self.augment.refuse(("randaugment", "erase"), "RandAugment and erasing belong to fine-tuning")
        if self.trunk != "vit" and self.objective.name != "mim":
            reason = f"{self.objective.name} needs a trunk of one resolution, and trunk={self.trunk} has several"
            raise ConfigError("objective.name", self.objective.name, reason, "use objective.name=mim, or trunk=vit")
        if self.trunk == "vit":
            check_trainable(self.model, self.data.image_size, self.engine.recompute)
            if self.objective.name == "mae":
                check_visible_only(self.model)

    @property
    def patch(self) -> int:
        """Pixels on the side of what is hidden or not, and predicted."""
        section = section_of(self)
        if isinstance(section, Model):
            return resolve(section).patch
        stride = stride_of(section, self.data.image_size)
        return min(stride, self.mask.cell) if self.mask.kind == "coarse" else stride

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across an image."""
        return grid_of(self.data.image_size, self.patch)
