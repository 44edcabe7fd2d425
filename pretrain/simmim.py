"""SimMIM on hierarchical trunks (Xie et al., 2022): hidden patches of the stem, predictions from the last stage.

On a plain ViT SimMIM is MIM (mim.py) with target pixels and absolute error: its 1x1 convolution and pixel shuffle are
one linear map per patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError
from halfseen.models.staged import Staged
from halfseen.models.swin import Swin

from .collapse import feature_rank
from .mim import MIM, Compared, MIMConfig
from .patches import patchify, unpatchify
from .targets import Target


class SimMIM(MIM):
    """The student: a trunk of several stages with a mask token, a linear head and their loss.

    As MIM, except what N counts: units of ``unit`` pixels, the target's patches. They are the places of the last stage
    (32 pixels for four stages), or finer, down to the patches of the stem; then only pixels can be predicted.
    """

    def __init__(self, encoder: Swin | Staged, cfg: MIMConfig, hidden: int, target: Target, unit: int) -> None:
        stride = encoder.stride
        if stride % unit or unit % encoder.patch or (unit < stride and target.width != 3 * unit**2):
            reason = f"the trunk answers every {stride} pixels from patches of {encoder.patch}"
            fix = f"use {stride}, or for pixels a divisor of it that is a multiple of {encoder.patch}"
            raise ConfigError("mask.cell", unit, reason, fix)
        trunk: Any = encoder
        super().__init__(trunk, MIMConfig("trunk", cfg.mean), hidden, target)  # BEiT's start is for plain ViTs
        self.unit, self.stride = unit, stride
        self.visible = encoder.tokens * (stride // unit) ** 2 - hidden
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.stem_width)) if hidden else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        if unit < stride:
            self.head = nn.Linear(encoder.width, 3 * stride**2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.encoder(batch["image"], batch["mask"] if self.hidden else None, mask_token=self.mask_token)
        places = tokens[:, self.encoder.prefix :]
        prediction = in_units(self.head(places), self.stride, self.unit, self.encoder.grid)
        if batch.get("task") == "predict":
            return {"prediction": prediction, "latent": tokens}
        compared = Compared.of(batch["mask"], self.hidden, self.visible, self.cfg.mean)
        scalars = self.criterion(compared.rows(prediction), compared.rows(batch["target"]), compared.weight)
        return scalars | {"feature_rank": feature_rank(places.mean(1))}

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward."""
        return 3.0 * (self.encoder.flops() + 2.0 * self.encoder.tokens * self.head.weight.numel())


def in_units(prediction: Tensor, stride: int, unit: int, grid: tuple[int, int]) -> Tensor:
    """The pixels of each place [B, places, 3 * stride^2], unit by unit, row by row: [B, N, 3 * unit^2].

    Themselves where a unit is a place; then they need not be pixels.
    """
    return prediction if unit == stride else patchify(unpatchify(prediction, stride, grid), unit)
