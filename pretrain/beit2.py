"""BEiT v2's student: mim, with a second prediction that has to go through the class token (Peng et al., 2022)."""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError, at_least, positive
from halfseen.models import ViT
from halfseen.models.build import blocks_of
from halfseen.models.vit import block_flops

from .collapse import feature_rank
from .initial import narrow, quieten
from .mim import MIM, Compared, MIMConfig
from .targets import Target


@dataclass
class BEiT2Config(MIMConfig):
    """Patch aggregation: early patch tokens and the last class token through a few more blocks."""

    early: int = 9  # blocks after which patch tokens are taken (L: 21)
    extra: int = 2  # blocks that class token and early patches go through; thrown away after pretraining
    shared_head: bool = True  # the branch uses the trunk's norm and the same head, else its own

    def check(self, key: str) -> None:
        """Ranges."""
        positive(f"{key}.extra", self.extra)
        at_least(f"{key}.early", self.early, 1)


class Aggregation(nn.Module):
    """The parts of the second branch; BEiT2.forward says how they are used."""

    def __init__(self, encoder: ViT, cfg: BEiT2Config, outputs: int) -> None:
        super().__init__()
        depth, size, model = encoder.depth, encoder.size, encoder.cfg
        # Drop path goes on rising where the branch begins, on a ramp as long as the longer way.
        steps = max(depth, cfg.early + cfg.extra)
        ramp = blocks_of(replace(model, share=1, groups=[]), replace(size, depth=steps), encoder.grid, encoder.prefix)
        self.blocks = nn.ModuleList(ramp[cfg.early : cfg.early + cfg.extra])
        own = not cfg.shared_head
        self.norm = nn.LayerNorm(encoder.width, eps=model.norm_eps) if own else None
        self.head = nn.Linear(encoder.width, outputs) if own else None


class BEiT2(MIM):
    """The student: as MIM, and the same prediction from the last class token and the patches of block ``early`` alone.

    Both losses count equally. The trunk's relative position bias serves the extra blocks, too. With task="predict" the
    prediction is the trunk's.
    """

    def __init__(self, encoder: ViT, cfg: BEiT2Config, hidden: int, target: Target) -> None:
        super().__init__(encoder, cfg, hidden, target)
        if encoder.cls_token is None or encoder.prefix != 1:
            raise ConfigError("model.class_token", False, "the class token carries BEiT v2's second branch", "use one")
        if not hidden:
            raise ConfigError("mask.kind", "none", "BEiT v2 predicts hidden patches", "use mask.kind=block")
        ends = list(accumulate(encoder.groups))
        if cfg.early not in ends:
            reason = f"must be one of {encoder.depth} blocks, counted from 1, and the last of those that share weights"
            raise ConfigError("objective.beit2.early", cfg.early, reason, f"use one of {ends}")
        self.early = ends.index(cfg.early) + 1
        self.aggregation = Aggregation(encoder, cfg, target.width)
        narrow(self.aggregation)
        if cfg.start == "beit":
            for number, block in enumerate(self.aggregation.blocks):
                quieten(block, cfg.early + number + 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        if batch.get("task") == "predict":
            return super().forward(batch)
        tokens, branch = self.tokens(batch["image"], batch["mask"])
        compared = Compared.of(batch["mask"], self.hidden, self.visible, self.cfg.mean)
        answers = compared.rows(batch["target"])
        main = self.criterion(self.head(compared.rows(tokens[:, 1:])), answers, compared.weight)
        head = self.aggregation.head or self.head
        second = self.criterion(head(compared.rows(branch[:, 1:])), answers, compared.weight)
        curves = {f"{name}_class": value for name, value in second.items() if name in ("loss", "accuracy")}
        losses = {"loss_patch": main["loss"], "loss": main["loss"] + second["loss"]}
        return main | curves | losses | {"feature_rank": feature_rank(tokens[:, 0])}

    def tokens(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + N, D] after the last norm, of the trunk and of the branch.

        The branch: class token after the last block and patches after block ``early``, through the extra blocks.
        """
        encoder, places = self.encoder, self.encoder.places()
        x = encoder.embed(image, mask=mask, mask_token=self.mask_token)
        for block in encoder.blocks[: self.early]:
            x = block(x, places=places)
        patches = x[:, 1:]
        for block in encoder.blocks[self.early :]:
            x = block(x, places=places)
        branch = torch.cat([x[:, :1], patches], dim=1)
        for block in self.aggregation.blocks:
            branch = block(branch, places=places)
        norm = self.aggregation.norm or encoder.norm
        return encoder.norm(x), norm(branch)

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return [*self.encoder.blocks, *self.aggregation.blocks]

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward."""
        encoder = self.encoder
        tokens = encoder.tokens + encoder.prefix
        extra = len(self.aggregation.blocks) * block_flops(tokens, encoder.width, encoder.size.hidden)
        head = 2.0 * self.hidden * encoder.width * self.head.out_features
        return super().train_flops_per_image() + 3.0 * (extra + head)
