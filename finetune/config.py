"""The fine-tuning stage's options: the shared sections plus the task, and a sequence of stages."""

from dataclasses import dataclass, field
from typing import Any, Literal

from halfseen.classification import Task
from halfseen.config import Augment, ConfigError, Data, Model, Monitor, Optim, Run
from halfseen.engine_config import Engine
from halfseen.models.alternet import AlterNetConfig
from halfseen.models.hierarchical import TimmConfig
from halfseen.models.pyramid import PyramidConfig
from halfseen.models.swin import SwinConfig
from halfseen.models.trainable import check_trainable
from halfseen.models.trunks import Kind


@dataclass
class Finetune:
    """A fine-tuning run. Defaults are MAE's published recipe for ViT-B (100 epochs)."""

    stage: Literal["finetune"] = "finetune"
    # One after another: name, init (last, best or ema of the stage before), and sections that override the ones here.
    stages: list[dict[str, Any]] = field(default_factory=list)  # empty: one stage, in the run folder itself
    trunk: Kind = "vit"  # which section describes the trunk: vit model, the others their own
    model: Model = field(default_factory=lambda: Model(drop_path=0.1))
    swin: SwinConfig = field(default_factory=SwinConfig)
    timm: TimmConfig = field(default_factory=TimmConfig)
    alternet: AlterNetConfig = field(default_factory=AlterNetConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    data: Data = field(default_factory=Data)
    augment: Augment = field(
        default_factory=lambda: Augment(
            crop_scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0
        )
    )
    task: Task = field(default_factory=Task)
    optim: Optim = field(
        default_factory=lambda: Optim(
            base_lr=5e-4, min_lr=1e-6, warmup="5ep", betas=(0.9, 0.999), decay_tokens=False, layer_decay=0.65
        )
    )
    engine: Engine = field(default_factory=Engine)
    run: Run = field(default_factory=lambda: Run(images="100ep", global_batch=1024, checkpoint_every="5ep"))
    monitor: Monitor = field(default_factory=Monitor)

    def check(self, key: str) -> None:
        """Combinations of sections that make no sense together."""
        if self.data.classes < 2:
            raise ConfigError(
                "data.classes", self.data.classes, "a classifier needs at least two", "e.g. data.classes=1000"
            )
        if self.data.label == "none":
            raise ConfigError("data.label", "none", "fine-tuning needs labels", "name a member extension, e.g. cls")
        if self.task.pool == "class" and self.trunk == "vit" and not self.model.class_token:
            raise ConfigError(
                "task.pool",
                "class",
                "model.class_token is false, so there is no such token",
                "use task.pool=mean",
            )
        if self.trunk == "vit":
            check_trainable(self.model, self.data.image_size, self.engine.recompute)
        if self.task.frozen == "bf16" and self.engine.precision != "bf16":
            raise ConfigError(
                "task.frozen",
                "bf16",
                f"the forward runs in {self.engine.precision}",
                "use engine.precision=bf16, or task.frozen=fp32",
            )
        if self.task.keep_best and not self.data.val:
            raise ConfigError("task.keep_best", True, "nothing is evaluated", "name data.val, or task.keep_best=false")
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        if mixes and 0 < self.task.mix_stride < self.data.repeats:
            raise ConfigError(
                "task.mix_stride",
                self.task.mix_stride,
                f"is below data.repeats={self.data.repeats}, so images would be mixed with themselves",
                f"use task.mix_stride={self.data.repeats} or more",
            )
