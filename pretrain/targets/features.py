"""Targets that are features: what a frozen teacher makes of each patch, and how far a prediction is from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import Augment, ConfigError, positive
from halfseen.teachers import Layers, Teacher, TeacherConfig

from ..collapse import spread
from ..pictures import covered, sheet
from .average import average

DistanceName = Literal["cosine", "smooth_l1", "mse"]


@dataclass
class Distance:
    """How far a predicted feature is from the right one."""

    loss: DistanceName = "cosine"  # 1 - cosine; smooth_l1: a square up to beta, then linear; mse
    beta: float = 2.0  # smooth_l1: the difference up to which it is a square

    def check(self, key: str) -> None:
        """Ranges."""
        positive(f"{key}.beta", self.beta)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Both float32 [..., D] -> [...]."""
        if self.loss == "cosine":
            return 1 - F.cosine_similarity(prediction, target, dim=-1)
        if self.loss == "mse":
            return (prediction - target).square().mean(-1)
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta).mean(-1)


@dataclass
class FeaturesConfig(Distance):
    """A frozen teacher's features."""

    loss: DistanceName = "cosine"  # 1 - cosine (EVA, MVP); smooth_l1 (Feature Distillation); mse
    beta: float = 2.0  # smooth_l1: the difference up to which it is a square
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    layers: list[int] = field(default_factory=list)  # blocks whose outputs are averaged; empty: after the last norm
    whiten: bool = False  # give each token mean 0 and variance 1 over its channels (Feature Distillation)
    resize: bool = False  # bring a teacher's grid of another size to the student's, bilinearly
    project: bool = False  # put the teacher's head on every token: CLIP's projection, as VQ-KD does

    def check(self, key: str) -> None:
        """Ranges."""
        super().check(key)
        if self.project and self.layers:
            raise ConfigError(f"{key}.project", True, "the head belongs on the last block's tokens", "use layers=[]")
        if len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"{key}.layers", self.layers, "names a block twice", "name each block once")


@dataclass
class AverageConfig(Distance):
    """The student's own averaged weights as a teacher (data2vec); engine.ema is their decay."""

    loss: DistanceName = "smooth_l1"  # 1 - cosine; smooth_l1 (data2vec); mse
    beta: float = 2.0  # smooth_l1: the difference up to which it is a square
    layers: int = 6  # last blocks whose outputs are averaged
    whiten_each: bool = True  # whiten each block's tokens before the mean (the official code's default)
    whiten: bool = True  # whiten the mean

    def check(self, key: str) -> None:
        """Ranges."""
        super().check(key)
        positive(f"{key}.layers", self.layers)


class Apart:
    """Loss and picture of all feature targets; subclasses say what is right. One of a family, see pretrain/targets."""

    def __init__(self, distance: Distance, width: int, patch: int) -> None:
        self.distance, self.width, self.patch = distance, width, patch

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Distance, cosine, and the variance over patches of both sides: [..., D] each, of patches that count.

        A predicted variance that sinks towards 0, or a target's, is a collapse: the same answer to everything.
        """
        prediction, target = prediction.float(), target.float()
        with torch.no_grad():
            cosine = F.cosine_similarity(prediction, target, dim=-1)
            curves = {
                "cosine": average(cosine, weight),
                "prediction_variance": spread(prediction),
                "target_variance": spread(target),
            }
        return {"loss": average(self.distance(prediction, target), weight)} | curves

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """Masked image, how well each patch is predicted, and the image: uint8 [3, height, width].

        White: the prediction points where the target does; black: at right angles to it or worse.
        """
        height, width = (side // self.patch for side in batch["image"].shape[2:])
        masked, original = covered(batch["image"], batch["mask"], self.patch, augment.mean, augment.std)
        target = batch["target"][:, -height * width :]  # patches are last
        cosine = F.cosine_similarity(prediction.float(), target.float(), dim=-1)
        agreement = cosine.view(-1, 1, height, width).clamp(0, 1)
        shown = agreement.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3).expand_as(original)
        return sheet([masked, shown, original])


class Average(Apart):
    """data2vec's target: what the student's own averaged weights make of the whole image.

    The mean of the last blocks' outputs. No frozen object has the answer, so calling it gives None: the engine asks the
    averaged student, which calls ``of`` (see Engine.taught and pretrain/data2vec.py).
    """

    def __init__(self, cfg: AverageConfig, depth: int, width: int, patch: int) -> None:
        super().__init__(cfg, width, patch)
        if cfg.layers > depth:
            raise ConfigError("target.average.layers", cfg.layers, f"the student has {depth} blocks", "use fewer")
        self.cfg, self.blocks = cfg, tuple(range(depth - cfg.layers, depth))

    def __call__(self, batch: dict[str, Any]) -> None:
        """Nothing: see the class."""

    def of(self, layers: Sequence[Tensor]) -> Tensor:
        """Outputs [B, N, D] of self.blocks -> float32 [B, N, D]."""
        mean = mean_of(layers, self.cfg.whiten_each)
        return whitened(mean) if self.cfg.whiten else mean


class Features(Apart):
    """Features of the same view by a frozen teacher."""

    def __init__(
        self, teacher: Teacher, cfg: FeaturesConfig, grid: tuple[int, int], patch: int, image: Tensor, prefix: int = 0
    ) -> None:
        """image: any [1, 3, S, S] of the student's size, to find out what the teacher makes of it. grid: the student's.

        prefix: tokens before the patches that the student predicts as well; the teacher must have as many.
        """
        self.teacher, self.cfg, self.grid, self.prefix = teacher, cfg, grid, prefix
        self.layers = Layers(hidden=tuple(cfg.layers))
        teacher.check(layers=self.layers)
        self.head = head_of(teacher) if cfg.project else None
        answer = self._look(image)
        self.teachers_grid = square(answer.shape[1] - self.teacher.prefix, grid)
        self._refuse_other_tokens()
        super().__init__(cfg, answer.shape[-1], patch)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """batch["image"] float [B, 3, H, W] -> float32 [B, prefix + N, D]."""
        tokens = self._look(batch["image"])
        first, patches = tokens[:, : self.teacher.prefix], tokens[:, self.teacher.prefix :]
        patches = resized(patches, self.teachers_grid, self.grid)
        tokens = torch.cat([first[:, : self.prefix], patches], dim=1) if self.prefix else patches
        return whitened(tokens) if self.cfg.whiten else tokens

    def _look(self, image: Tensor) -> Tensor:
        """The teacher's tokens, its prefix first: float32 [B, prefix' + N', D]."""
        seen = self.teacher.look(image, self.layers)
        if self.layers.hidden:
            return mean_of(seen.hidden)
        tokens = torch.cat([seen.prefix, seen.features], dim=1).float()
        return tokens if self.head is None else self.head(tokens)

    def _refuse_other_tokens(self) -> None:
        key, teacher = self.teacher.key, self.teacher
        if self.teachers_grid != self.grid and not self.cfg.resize:
            (height, width), (own, across) = self.teachers_grid, self.grid
            fits = round(teacher.source.image_size * own / height)
            raise ConfigError(
                f"{key}.source",
                teacher.source.name,
                f"sees {height} x {width} patches of {teacher.source.image_size} pixels, the student {own} x {across}",
                f"set {key}.image_size={fits} if the teacher can be built for that, "
                f"or {key.removesuffix('.teacher')}.resize=true to resample its features",
            )
        if self.prefix > teacher.prefix:
            raise ConfigError(
                f"{key}.source",
                teacher.source.name,
                f"has {teacher.prefix} tokens before its patches, the student is to predict {self.prefix}",
                "use a teacher with a class token, or objective.fd.class_token=false",
            )


def head_of(teacher: Teacher) -> nn.Linear:
    """The linear map that a teacher ends with."""
    head = getattr(teacher.module, "head", None)
    if not isinstance(head, nn.Linear):
        reason = f"{teacher.source.name} ends with no linear map that tokens could go through"
        raise ConfigError("target.features.project", True, reason, "use project=false")
    return head


def square(tokens: int, like: tuple[int, int]) -> tuple[int, int]:
    """The grid of so many tokens with the proportions of another grid."""
    height = round((tokens * like[0] / like[1]) ** 0.5)
    if not height or tokens % height:
        raise ConfigError("target.features.teacher", tokens, "tokens are no grid of the image's proportions", "another")
    return height, tokens // height


def resized(tokens: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Tokens [B, h*w, D] of one grid resampled to another; themselves where the grids are equal."""
    if old == new:
        return tokens
    plane = tokens.transpose(1, 2).unflatten(2, old)
    # Antialiasing: a finer grid is averaged, not sampled.
    return F.interpolate(plane, new, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def whitened(tokens: Tensor) -> Tensor:
    """Tokens [..., D], each with mean 0 and variance 1 over its channels: LayerNorm without weights, float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def mean_of(layers: Sequence[Tensor], each: bool = False) -> Tensor:
    """The mean of several blocks' tokens [B, N, D], float32; each: of every one whitened."""
    ready = whitened if each else Tensor.float
    total = ready(layers[0])
    for layer in layers[1:]:
        total = total + ready(layer)
    return total / len(layers)
