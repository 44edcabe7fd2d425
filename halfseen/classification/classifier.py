"""The classification student: trunk, pooling, linear head and loss."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from halfseen.models import ViT
from halfseen.optim import trunk_layers

from .task import Task


class Classifier(nn.Module):
    """A ViT that names classes.

    forward(batch) takes image float [B, 3, S, S] and, to train, target float [B, K] (rows may mix classes);
    it returns the loss and the share of images whose largest target is predicted. With batch["task"] ==
    "predict" it returns features [B, D] and logits [B, K] instead.
    """

    def __init__(self, encoder: ViT, task: Task, classes: int) -> None:
        super().__init__()
        self.task, self.classes = task, classes
        self.encoder = encoder
        # MAE's mean pooling normalises after the mean; the trunk's own final norm is then left out.
        self.fc_norm: nn.Module = nn.Identity()
        if task.pool == "mean":
            self.fc_norm = nn.LayerNorm(encoder.width, eps=encoder.cfg.norm_eps)
            encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=task.head_std)
        nn.init.zeros_(self.head.bias)
        if task.train == "head":
            encoder.requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        features = self.features(batch["image"])
        logits = self.head(features)
        if batch.get("task", "train") == "predict":
            return {"features": features, "logits": logits}
        target = batch["target"]
        loss = LOSSES[self.task.loss](logits.float(), target)
        hit = logits.detach().argmax(-1) == target.argmax(-1)
        return {"loss": loss, "accuracy": hit.float().mean()}

    def features(self, image: Tensor) -> Tensor:
        """What the head sees: images [B, 3, S, S] to [B, D]."""
        tokens = self.encoder(image)
        pooled = tokens[:, 0] if self.task.pool == "class" else tokens[:, self.encoder.prefix :].mean(1)
        return self.fc_norm(pooled)

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen trunk stays in evaluation mode: no drop path, no moving batch statistics."""
        super().train(mode)
        if self.task.train == "head":
            self.encoder.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return list(self.encoder.blocks)

    def train_flops_per_image(self) -> float:
        """Matrix multiplications of one training step: three forwards, or one of a frozen trunk."""
        encoder = self.encoder.flops() * (1 if self.task.train == "head" else 3)
        return encoder + 3 * 2 * self.encoder.width * self.classes

    def layers(self) -> int:
        """The id of the last layer (final norm and head): ids run from 0 to this."""
        return len(self.encoder.blocks) + 1

    def layer_of(self, name: str) -> int:
        """A parameter's layer: embeddings 0, block i is i + 1 (a shared block counts once), the rest last."""
        return trunk_layers(len(self.encoder.blocks))(name)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the cross entropy with soft targets, both [B, K]."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """DeiT III: every class present in a mixed image counts fully; mean over images and classes."""
    return F.binary_cross_entropy_with_logits(logits, (target > 0).to(logits.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": binary_cross_entropy}
