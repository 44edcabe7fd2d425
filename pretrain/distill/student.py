"""The student: a classifier and its losses against labels and teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.classification import Classifier, Task
from halfseen.classification.classifier import LOSSES
from halfseen.config import ConfigError
from halfseen.models.swin import Swin
from halfseen.models.vit import Trace

from . import losses
from .config import Distillation
from .masking import HiddenPatches


class Distilled(Classifier):
    """A classifier that learns from a teacher too; without a teacher it is its base, weights and all.

    forward(batch) takes, beside image and target, what the teacher says of the same images: teacher_logits float
    [B, K], teacher_qkv and teacher_hidden, a tensor for each compared block ([B', N, 3C'] and [B, N, C'], patch tokens
    only). It returns the loss, its weighted terms, and the shares of images on which the student agrees with the
    label and with the teacher. With masked image modelling the batch holds mask bool [B, N], True = hidden, and
    hidden_target [B, N, ...] too.
    """

    def __init__(
        self,
        encoder: Any,
        task: Task,
        classes: int,
        cfg: Distillation,
        teacher_widths: Sequence[int] = (),
        hidden_patches: HiddenPatches | None = None,
    ) -> None:
        """teacher_widths: channels of each compared block of the teacher, for hidden_form=match."""
        super().__init__(encoder, task, classes)
        self.cfg = cfg
        # Where each compared block's projection is: one per stage of a Swin (its blocks have one width), else its own.
        staged = isinstance(encoder, Swin)
        self.fit_of = [str(encoder.stage_of(n) if staged else n) for n in cfg.student_layers]
        self.fits = nn.ModuleDict()
        if cfg.hidden and cfg.hidden_form == "match":
            for block, fit, width in zip(cfg.student_layers, self.fit_of, teacher_widths, strict=True):
                if fit in self.fits and self.fits[fit].out_features != width:
                    reason = "two blocks of one stage are matched with teacher's blocks of different widths"
                    fix = "match them with blocks of one stage"
                    raise ConfigError("distillation.teacher_layers", cfg.teacher_layers, reason, fix)
                self.fits[fit] = new_fit(encoder.width_of(block) if staged else encoder.width, width)
        self.hidden_patches = hidden_patches

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        if batch.get("task") == "predict":
            return super().forward(batch)
        trace = self._seen(batch)
        logits = self.head(self.pooled(trace.tokens)).float()
        taught = logits if self.head_dist is None else self.head_dist(trace.tokens[:, 1]).float()
        terms = self._scores(logits, taught, batch) | self._relations(trace, batch)
        shown = {"accuracy": agreement(logits, batch["target"])}
        if self.hidden_patches is not None:
            # Where the classifier's norm comes after its mean, it is the tokens' norm too, as of a teacher.
            found = self.hidden_patches.scalars(self.fc_norm(trace.tokens), batch)
            terms["loss_mim"] = found.pop("loss_mim")
            shown |= found
        shown |= {name: batch[name] for name in ("teacher_ms", "teacher_share") if name in batch}
        if "teacher_logits" in batch:
            shown["agreement"] = agreement(taught, batch["teacher_logits"])
        return {"loss": torch.stack(list(terms.values())).sum(), **terms, **shown}

    @property
    def terms(self) -> list[str]:
        """The terms of the loss, by the names under which forward returns them."""
        cfg = self.cfg
        weights = {
            "labels": cfg.label_weight,
            "scores": cfg.share if cfg.scores != "none" else 0.0,
            "attention": cfg.attention,
            "hidden": cfg.hidden,
            "mim": 0.0 if self.hidden_patches is None else self.hidden_patches.weight,
        }
        return [f"loss_{name}" for name, weight in weights.items() if weight]

    def _seen(self, batch: dict[str, Any]) -> Trace:
        """The trunk's tokens and the compared blocks, of the image as the student sees it."""
        layers, image = self.cfg.student, batch["image"]
        if self.hidden_patches is not None:
            return self.hidden_patches.see(self.encoder, batch, layers)
        if layers.qkv or layers.hidden:
            return self.encoder.trace(image, layers=layers.hidden, qkv=layers.qkv)
        return Trace(self.encoder(image))

    def _beside(self, tokens: Sequence[Tensor], batch: dict[str, Any]) -> list[Tensor]:
        """The teacher's patch tokens of each block that the student's are compared with."""
        part = self.hidden_patches
        return list(tokens) if part is None else [part.alike(each, batch) for each in tokens]

    def _scores(self, logits: Tensor, taught: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of the class head on labels and of the taught head on the teacher's scores, weighted."""
        cfg, terms = self.cfg, {}
        if cfg.label_weight:
            terms["loss_labels"] = cfg.label_weight * LOSSES[self.task.loss](logits, batch["target"])
        if cfg.scores != "none" and cfg.share:
            value = losses.of_scores(cfg.scores, taught, batch["teacher_logits"], cfg.temperature)
            terms["loss_scores"] = cfg.share * value
        return terms

    def _relations(self, trace: Trace, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of the compared blocks, mean over blocks, weighted."""
        cfg, prefix, terms = self.cfg, self.encoder.prefix, {}
        if cfg.attention:
            theirs = self._beside(batch["teacher_qkv"], batch)
            pairs = zip((trace.qkv[n][:, prefix:] for n in cfg.student_layers), theirs, strict=True)
            values = [losses.attention_relation(a, b, cfg.relation_heads, cfg.pairs) for a, b in pairs]
            terms["loss_attention"] = cfg.attention * losses.over_layers(values)
        if cfg.hidden:
            theirs = self._beside(batch["teacher_hidden"], batch)
            pairs = zip((trace.layers[n][:, prefix:] for n in cfg.student_layers), theirs, strict=True)
            values = [self._hidden(a, b, fit) for (a, b), fit in zip(pairs, self.fit_of)]
            terms["loss_hidden"] = cfg.hidden * losses.over_layers(values)
        return terms

    def _hidden(self, ours: Tensor, theirs: Tensor, fit: str) -> Tensor:
        """The loss on one block's result."""
        if self.cfg.hidden_form == "match":
            return losses.matching(self.fits[fit](ours), theirs)
        return losses.hidden_relation(ours, theirs, self.cfg.hidden_form, self.cfg.hidden_factor)

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        part = self.hidden_patches
        return super().blocks() + ([] if part is None else part.blocks())

    def train_flops_per_image(self) -> float:
        """Matrix multiplications of one training step; the losses' own are left out."""
        if self.hidden_patches is None:
            return super().train_flops_per_image()
        head = 2.0 * self.encoder.width * self.classes
        return 3.0 * (self.hidden_patches.flops(self.encoder) + head)


def new_fit(width: int, teacher_width: int) -> nn.Linear:
    """A projection from the student's width to the teacher's; thrown away after training."""
    fit = nn.Linear(width, teacher_width)
    nn.init.trunc_normal_(fit.weight, std=0.02)
    nn.init.zeros_(fit.bias)
    return fit


def agreement(logits: Tensor, target: Tensor) -> Tensor:
    """Share of rows of two [B, K] whose highest entry is the same."""
    return (logits.detach().argmax(-1) == target.argmax(-1)).float().mean()
