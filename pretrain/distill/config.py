"""The distillation stage's options: the shared sections, the teacher, and what is learned from it."""

from dataclasses import dataclass, field
from typing import Literal

from halfseen.classification import Task
from halfseen.config import Augment, ConfigError, Data, Model, Monitor, Optim, Run, at_least, between, positive
from halfseen.engine_config import Engine
from halfseen.models.alternet import AlterNetConfig
from halfseen.models.hierarchical import TimmConfig
from halfseen.models.legality import check_visible_only
from halfseen.models.pyramid import PyramidConfig
from halfseen.models.swin import SwinConfig
from halfseen.models.trainable import check_trainable
from halfseen.models.trunks import Kind
from halfseen.teachers import Layers, TeacherConfig

from ..config import Mask, Target
from ..mae import MAEConfig
from .store import Answers


@dataclass
class Distillation:
    """What the student learns from the teacher, beside the labels. Blocks are counted from 0, repetitions included."""

    # hard: the teacher's class; soft: KL over images x classes (DeiT); soft_ce: cross entropy (MiniViT); bce: per class
    scores: Literal["none", "hard", "soft", "soft_ce", "bce"] = "soft"  # loss on scores, see above
    share: float = 0.5  # weight of that loss; the loss on labels has the rest, 1 - share
    temperature: float = 1.0  # both sides' scores are divided by it (soft, soft_ce, bce)
    student_layers: list[int] = field(default_factory=list)  # blocks that are compared, ascending
    teacher_layers: list[int] = field(default_factory=list)  # their partners in the teacher, ascending
    attention: float = 0.0  # weight of the relations among queries, keys and values
    relation_heads: int = 1  # relation heads that the channels are cut into; must divide both widths
    pairs: Literal["all", "same"] = "all"  # all nine pairs of q, k and v, or q-q, k-k and v-v only
    hidden: float = 0.0  # weight of the loss on the blocks' results
    # code: 49 x squared difference of cosines; paper: cross entropy of relations; match: squared, through a projection
    hidden_form: Literal["code", "paper", "match"] = "code"  # how results are compared, see above
    hidden_factor: float = 49.0  # form code: the factor, which the released code leaves at 49 for any token count
    resize: bool = False  # bring the teacher's patch tokens to the student's grid where the numbers differ
    gradients: bool = False  # with run.picture_every: log each term's gradient norm; a forward and backward for each

    @property
    def student(self) -> Layers:
        """What has to be recorded of the student."""
        return self._layers(self.student_layers)

    @property
    def teacher(self) -> Layers:
        """What has to be recorded of the teacher."""
        return self._layers(self.teacher_layers)

    def _layers(self, blocks: list[int]) -> Layers:
        return Layers(tuple(blocks) if self.attention else (), tuple(blocks) if self.hidden else ())

    def check(self, key: str) -> None:
        """Ranges, and lists of blocks that pair up."""
        between(f"{key}.share", self.share, 0.0, 1.0)
        for name in ("temperature", "relation_heads", "hidden_factor"):
            positive(f"{key}.{name}", getattr(self, name))
        for name in ("attention", "hidden"):
            at_least(f"{key}.{name}", getattr(self, name), 0.0)
        for name in ("student_layers", "teacher_layers"):
            blocks = getattr(self, name)
            if blocks != sorted(set(blocks)) or (blocks and blocks[0] < 0):
                reason = "is not ascending from 0 on; blocks are paired in the order of the network"
                raise ConfigError(f"{key}.{name}", blocks, reason, "e.g. [1,3,5]")
        ours, theirs = len(self.student_layers), len(self.teacher_layers)
        if ours != theirs:
            reason = f"{ours} blocks cannot be paired with {theirs}"
            raise ConfigError(f"{key}.student_layers", self.student_layers, reason, "name as many in both lists")
        if (self.attention or self.hidden) and not ours:
            raise ConfigError(
                f"{key}.student_layers", [], "no blocks are named to be compared", "e.g. [11], and teacher_layers=[11]"
            )
        scored = self.scores != "none" and self.share > 0
        if not (scored or self.attention or self.hidden):
            name = "share" if self.scores != "none" else "scores"
            reason = "nothing is learned from the teacher"
            raise ConfigError(f"{key}.{name}", getattr(self, name), reason, "give it a weight, or fine-tune without")

    @property
    def label_weight(self) -> float:
        """Weight of the loss on labels."""
        return 1.0 if self.scores == "none" else 1.0 - self.share


@dataclass
class Masking:
    """Masked image modelling at the same time: the student sees a masked image, the teacher the whole one."""

    weight: float = 0.0  # of the loss on hidden patches; 0: nothing is hidden
    # mae: the student's scores and relations are those of visible patches
    form: Literal["mim", "mae"] = "mim"  # mim: hidden patches replaced (BEiT, SimMIM); mae: left out, and decoded
    mask: Mask = field(default_factory=lambda: Mask(ratio=0.6))
    target: Target = field(default_factory=lambda: Target(normalise=False, error="absolute"))
    mae: MAEConfig = field(default_factory=MAEConfig)  # of form mae

    def check(self, key: str) -> None:
        """Ranges."""
        at_least(f"{key}.weight", self.weight, 0.0)


@dataclass
class Distill:
    """A distillation run. Defaults are DeiT's published recipe for the distilled ViT-B (300 epochs)."""

    stage: Literal["distill"] = "distill"
    trunk: Kind = "vit"  # which section describes the student: vit model, the others their own
    model: Model = field(default_factory=lambda: Model(distillation_token=True, drop_path=0.1))
    swin: SwinConfig = field(default_factory=SwinConfig)
    timm: TimmConfig = field(default_factory=TimmConfig)
    alternet: AlterNetConfig = field(default_factory=AlterNetConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    data: Data = field(default_factory=lambda: Data(repeats=3))
    augment: Augment = field(
        default_factory=lambda: Augment(
            crop_scale=(0.08, 1.0), jitter=0.4, randaugment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0
        )
    )
    task: Task = field(default_factory=lambda: Task(pool="class", head_std=0.02))
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distillation: Distillation = field(default_factory=Distillation)
    mim: Masking = field(default_factory=Masking)
    store: Answers = field(default_factory=Answers)
    optim: Optim = field(
        default_factory=lambda: Optim(
            base_lr=5e-4,
            base_batch=512,
            min_lr=1e-5,
            warmup="5ep",
            warmup_lr=1e-6,
            schedule="timm",
            betas=(0.9, 0.999),
            decay_tokens=False,
        )
    )
    engine: Engine = field(default_factory=lambda: Engine(ema=0.99996))
    run: Run = field(default_factory=lambda: Run(images="300ep", global_batch=1024, checkpoint_every="5ep"))
    monitor: Monitor = field(default_factory=Monitor)

    def check(self, key: str) -> None:
        """Combinations of sections that make no sense together."""
        if self.data.classes < 2:
            raise ConfigError("data.classes", self.data.classes, "a classifier needs at least two", "data.classes=1000")
        if self.data.label == "none":
            raise ConfigError("data.label", "none", "the labels are learned too, and evaluated", "e.g. data.label=cls")
        vit = self.trunk == "vit"
        if self.task.pool == "class" and self.trunk != "timm" and not (vit and self.model.class_token):
            fix = "task.pool=norm_mean, the mean of all tokens after the final norm"
            raise ConfigError("task.pool", "class", "the student has no class token", fix)
        if self.mim.weight and (self.trunk not in ("vit", "swin") or (vit and self.model.stem == "conv")):
            reason = "only a Swin, or a ViT whose stem works patch by patch, can see mask tokens"
            raise ConfigError("mim.weight", self.mim.weight, reason, "mim.weight=0")
        if self.mim.weight and not vit and self.mim.form == "mae":
            raise ConfigError("mim.form", "mae", "a Swin needs every place of its windows", "mim.form=mim")
        if vit:
            check_trainable(self.model, self.data.image_size, self.engine.recompute)
            if self.mim.weight and self.mim.form == "mae":
                check_visible_only(self.model)
        self._check_heads(vit and self.model.distillation_token)
        if self.augment.mixup + self.augment.cutmix > 0 and 0 < self.task.mix_stride < self.data.repeats:
            reason = f"is below data.repeats={self.data.repeats}, so images would be mixed with themselves"
            raise ConfigError("task.mix_stride", self.task.mix_stride, reason, f"use {self.data.repeats} or more")

    def _check_heads(self, two: bool) -> None:
        """Every head must learn something."""
        chosen = self.distillation
        if two and (chosen.scores == "none" or chosen.share in (0.0, 1.0)):
            raise ConfigError(
                "distillation.share",
                chosen.share,
                f"with model.distillation_token one head learns from labels, one from the teacher's scores (scores="
                f"{chosen.scores})",
                "use a share between 0 and 1, or model.distillation_token=false",
            )
        if two and not self.model.class_token:
            raise ConfigError("model.class_token", False, "the distillation token stands after it", "class_token=true")
