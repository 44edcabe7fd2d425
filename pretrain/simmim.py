"""SimMIM on a Swin Transformer (Xie et al., 2022): hidden patches of the stem, predictions from the last stage.

On a plain ViT SimMIM is MIM (mim.py) with target pixels and absolute error: its 1x1 convolution and pixel shuffle are
one linear map per patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError
from halfseen.models.swin import Swin

from .collapse import feature_rank
from .mim import MIM, Compared, MIMConfig
from .patches import patchify, unpatchify
from .targets import Target


class SimMIM(MIM):
    """The student: a Swin with a mask token, a linear head and their loss.

    As MIM, except what N counts: units of ``unit`` pixels, the target's patches. They are the places of the last stage
    (32 pixels for four stages), or finer, down to the patches of the stem; then only pixels can be predicted.
    """

    def __init__(self, encoder: Swin, cfg: MIMConfig, hidden: int, target: Target, unit: int) -> None:
        stride = encoder.stride
        if stride % unit or unit % encoder.patch or (unit < stride and target.width != 3 * unit**2):
            reason = f"the trunk answers every {stride} pixels from patches of {encoder.patch}"
            fix = f"use {stride}, or for pixels a divisor of it that is a multiple of {encoder.patch}"
            raise ConfigError("mask.cell", unit, reason, fix)
        trunk: Any = encoder
        super().__init__(trunk, MIMConfig("trunk", cfg.mean), hidden, target)  # BEiT's start is for plain ViTs
        self.unit, self.stride = unit, stride
        self.visible = encoder.tokens * (stride // unit) ** 2 - hidden
        stem = encoder.patch_embed.proj.out_channels
        self.mask_token = nn.Parameter(torch.zeros(1, 1, stem)) if hidden else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        if unit < stride:
            self.head = nn.Linear(encoder.width, 3 * stride**2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.encoder(batch["image"], batch["mask"] if self.hidden else None, mask_token=self.mask_token)
        prediction = self.head(tokens)
        if self.unit < self.stride:
            prediction = patchify(unpatchify(prediction, self.stride, self.encoder.grid), self.unit)
        if batch.get("task") == "predict":
            return {"prediction": prediction, "latent": tokens}
        compared = Compared.of(batch["mask"], self.hidden, self.visible, self.cfg.mean)
        scalars = self.criterion(compared.rows(prediction), compared.rows(batch["target"]), compared.weight)
        return scalars | {"feature_rank": feature_rank(tokens.mean(1))}

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward."""
        return 3.0 * (self.encoder.flops() + 2.0 * self.encoder.tokens * self.head.weight.numel())
