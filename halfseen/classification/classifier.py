"""The classification student: trunk, pooling, linear head and loss."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfseen import lora, selection
from halfseen.config import ConfigError
from halfseen.models import ViT
from halfseen.models.feed import Mlp
from halfseen.models.staged import Staged
from halfseen.models.trunks import Trunk
from halfseen.optim import trunk_layers

from .task import Task


class Classifier(nn.Module):
    """A trunk that names classes.

    forward(batch) takes image float [B, 3, S, S] and, to train, target float [B, K] (rows may mix classes);
    it returns the loss and the share of images whose largest target is predicted. With batch["task"] ==
    "predict" it returns features [B, D] and logits [B, K] instead. What does not train has ``requires_grad`` off.
    """

    def __init__(self, encoder: Trunk, task: Task, classes: int) -> None:
        super().__init__()
        self.task, self.classes = task, classes
        self.encoder = encoder
        if task.pool == "class" and not encoder.prefix:
            raise ConfigError("task.pool", "class", "the trunk has no class token", "task.pool=norm_mean")
        # MAE's mean pooling normalises after the mean; the trunk's own final norm is then left out.
        self.fc_norm: nn.Module = nn.Identity()
        if task.pool == "mean":
            if isinstance(encoder, Staged):
                raise ConfigError("task.pool", "mean", "the trunk's norm stands before the mean", "task.pool=norm_mean")
            self.fc_norm = nn.LayerNorm(encoder.width, eps=encoder.cfg.norm_eps)
            encoder.norm = nn.Identity()
        self.head = new_head(encoder.width, classes, task)
        # DeiT's second head reads the distillation token; the scores are the mean of both.
        self.head_dist = new_head(encoder.width, classes, task) if encoder.dist_token is not None else None
        if "lora" in task.train.split("+"):
            lora.insert(encoder, task.lora_rank, task.lora_alpha)
        self.selection = selection.freeze(
            self, task.train, positions=task.train_positions, strict_official=task.strict_official
        )
        if task.frozen == "bf16":
            halve_frozen(encoder)
        if task.recompute_mlp:
            recompute_frozen(encoder)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.encoder(batch["image"])
        logits = self.scores(tokens)
        if batch.get("task", "train") == "predict":
            return {"features": self.pooled(tokens), "logits": logits}
        target = batch["target"]
        loss = LOSSES[self.task.loss](logits.float(), target)
        hit = logits.detach().argmax(-1) == target.argmax(-1)
        return {"loss": loss, "accuracy": hit.float().mean()}

    def pooled(self, tokens: Tensor) -> Tensor:
        """What the head reads: the trunk's tokens [B, prefix + N, D] to [B, D]."""
        pooled = tokens[:, 0] if self.task.pool == "class" else tokens[:, self.encoder.prefix :].mean(1)
        return self.fc_norm(pooled)

    def scores(self, tokens: Tensor) -> Tensor:
        """The trunk's tokens to logits [B, K]; with two heads their mean."""
        logits = self.head(self.pooled(tokens))
        return logits if self.head_dist is None else (logits + self.head_dist(tokens[:, 1])) / 2

    def train(self, mode: bool = True) -> "Classifier":
        """What is frozen stays as it is (see selection.still)."""
        super().train(mode)
        selection.still(self)
        return self

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return list(self.encoder.blocks)

    def train_flops_per_image(self) -> float:
        """Matrix multiplications of one training step.

        Three forwards, less what is not needed: gradients of frozen matrices, and of whatever lies before the first
        block in which anything trains.
        """
        blocks = list(self.encoder.blocks)
        first = first_trained(self.encoder)
        matrices = [p for block in blocks[first:] for p in block.parameters() if p.ndim > 1 and not p.requires_grad]
        tokens, repeats = self.encoder.tokens + self.encoder.prefix, self.encoder.depth / len(blocks)
        backward = 2 * self.encoder.flops() * (len(blocks) - first) / len(blocks)
        backward -= 2 * tokens * repeats * sum(matrix.numel() for matrix in matrices)
        return self.encoder.flops() + backward + 3 * 2 * self.encoder.width * self.classes

    def layers(self) -> int:
        """The id of the last layer, the head's: ids run from 0 to this."""
        return self.layer_of("head.weight")

    def layer_of(self, name: str) -> int:
        """A parameter's layer: embeddings 0, block i is i + 1 (a shared block counts once), the rest last."""
        if isinstance(self.encoder, ViT):
            return trunk_layers(len(self.encoder.blocks))(name)
        ids = self.encoder.layer_ids()
        return ids.get(name.removeprefix("encoder."), max(ids.values()) + 1)


def trains(module: nn.Module) -> bool:
    """Whether anything in a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def first_trained(trunk: Trunk) -> int:
    """The first block that the backward has to reach: 0 if what stands before the blocks trains."""
    blocks = list(trunk.blocks)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    after = {id(parameter) for parameter in trunk.norm.parameters()}
    if any(p.requires_grad and id(p) not in inside | after for p in trunk.parameters()):
        return 0
    return next((index for index, block in enumerate(blocks) if trains(block)), len(blocks))


def halve_frozen(trunk: Trunk) -> None:
    """Keep the frozen linear maps of the blocks in bfloat16, the type autocast gives them anyway."""
    for module in trunk.blocks.modules():
        if isinstance(module, nn.Linear) and not trains(module):
            module.to(torch.bfloat16)


def recompute_frozen(trunk: Trunk) -> None:
    """Tell every frozen MLP to recompute its first product; ConfigError if there is none that can."""
    frozen = [module for module in trunk.modules() if isinstance(module, Mlp) and not trains(module)]
    if not frozen or not isinstance(trunk, ViT) or trunk.cfg.norm_place != "pre":
        raise ConfigError(
            "task.recompute_mlp", True, "only frozen MLPs behind a norm of their own can", "set it to false"
        )
    for mlp in frozen:
        mlp.recompute = True


def new_head(width: int, classes: int, task: Task) -> nn.Linear:
    """A linear map to class scores, nearly zero at the start."""
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=task.head_std)
    nn.init.zeros_(head.bias)
    return head


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the cross entropy with soft targets, both [B, K]."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """DeiT III: every class present in a mixed image counts fully; both [B, K], mean over images and classes."""
    return F.binary_cross_entropy_with_logits(logits, (target > 0).to(logits.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "bce": binary_cross_entropy}
