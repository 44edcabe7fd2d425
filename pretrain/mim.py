"""Masked image modeling with mask tokens (BEiT and its kin): the trunk sees every token, hidden ones replaced."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfseen.data.masks import split
from halfseen.models import ViT

from .collapse import feature_rank
from .initial import initialise_trunk, narrow, narrow_
from .targets import Target


@dataclass
class MIMConfig:
    """Prediction by one linear map from every hidden token of a trunk that sees all tokens."""

    start: Literal["trunk", "beit"] = "beit"  # initial weights of a ViT: the trunk's own, or BEiT's narrow normal ones
    mean: Literal["image", "patch"] = "image"  # what counts equally in the loss; differs for masks of uneven counts


class MIM(nn.Module):
    """The student: a trunk with a mask token, a linear head and their loss.

    forward takes image float [B, 3, S, S], mask bool [B, N] with at most ``hidden`` True per row, and target [B, N,
    ...] as the target makes it, and returns what target.loss makes of the hidden patches. hidden=0: nothing is ever
    hidden, there is no mask token, and all patches are compared. With task="predict" no target is needed, and it
    returns {"prediction": [B, N, target.width], "latent": [B, prefix + N, D]}.

    Order, as in BEiT, SimMIM and MaskFeat: stem, mask tokens, positions, blocks, norm, head.
    """

    def __init__(self, encoder: ViT, cfg: MIMConfig, hidden: int, target: Target) -> None:
        super().__init__()
        self.hidden, self.visible = hidden, encoder.tokens - hidden
        self.cfg, self.criterion = cfg, target.loss
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width)) if hidden else None
        self.head = nn.Linear(encoder.width, target.width)
        initialise(self, cfg.start)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.encoder(batch["image"], batch["mask"] if self.hidden else None, mask_token=self.mask_token)
        patches = tokens[:, self.encoder.prefix :]
        if batch.get("task") == "predict":
            return {"prediction": self.head(patches), "latent": tokens}
        compared = Compared.of(batch["mask"], self.hidden, self.visible, self.cfg.mean)
        scalars = self.criterion(self.head(compared.rows(patches)), compared.rows(batch["target"]), compared.weight)
        return scalars | {"feature_rank": feature_rank(patches.mean(1))}

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return list(self.encoder.blocks)

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward."""
        compared = self.hidden or self.encoder.tokens
        return 3.0 * (self.encoder.flops() + 2.0 * compared * self.encoder.width * self.head.out_features)


@dataclass(frozen=True)
class Compared:
    """Which patches a loss is about, without asking the device how many there are."""

    index: Tensor | None  # int64 [B, M], ascending; None: all
    weight: Tensor | None  # float32 [B, M], sums to 1; None: all equal

    @classmethod
    def of(cls, mask: Tensor, hidden: int, visible: int, mean: Literal["image", "patch"]) -> "Compared":
        """The hidden patches of mask bool [B, N], at most ``hidden`` per row; all patches if that is 0.

        A row with fewer is filled up with visible patches of weight 0. mean: every image counts equally, or every
        hidden patch (the official codes). Only the former does not depend on how a batch is split; where all rows hide
        as many, the two are the same.
        """
        if not hidden:
            return cls(None, None)
        index = split(mask, visible)[1]
        counted = mask.gather(1, index).float()
        per_row = counted.sum(1, keepdim=True).clamp(min=1)
        weight = counted / (per_row * len(mask)) if mean == "image" else counted / per_row.sum()
        return cls(index, weight)

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, ...] -> [B, M, ...]."""
        if self.index is None:
            return tokens
        index = self.index.view(*self.index.shape, *[1] * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
        return tokens.gather(1, index)


def initialise(student: Any, start: Literal["trunk", "beit"]) -> None:
    """Random weights of everything beside the trunk; with ``beit`` of the trunk, too."""
    for name, module in student.named_children():
        if name != "encoder":
            narrow(module)
    if start == "beit":
        initialise_trunk(student.encoder)
    if student.mask_token is not None:
        narrow_(student.mask_token)
