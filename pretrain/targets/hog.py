"""MaskFeat's target (Wei et al., 2022): histograms of oriented gradients of each patch.

The definition is SlowFast's (slowfast/models/operators.py), which is not the classic one: no blocks, whole votes for
one bin, gradients of the normalised image, each channel on its own.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.config import Augment, ConfigError

from ..collapse import variances
from ..pictures import covered, sheet
from .average import average

BINS = 9  # orientations over half a turn: a gradient and its opposite count as one
CELL = 8  # pixels on the side of one histogram
SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))


class HOG:
    """Histograms of the cells of each patch, channels apart; mean squared error.

    One of a family, see pretrain/targets. A patch of P pixels has (P / 8)^2 cells x 9 bins x 3 channels, in the order
    channel, bin, cell row, cell column.
    """

    def __init__(self, patch: int) -> None:
        if patch % CELL:
            raise ConfigError(
                "target.name", "hog", f"cells of {CELL} pixels do not divide a patch of {patch}", "use model.patch=16"
            )
        self.patch, self.cells = patch, patch // CELL
        self.width = 3 * BINS * self.cells**2

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """batch["image"] float [B, 3, h*P, w*P] -> float32 [B, N, 27 * (P / 8)^2]."""
        return by_patch(histograms(batch["image"].float()), self.cells)

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Mean squared error, and how much patches differ; both [B, M, width], of patches that count alone."""
        loss = average((prediction.float() - target.float()).square().mean(-1), weight)
        return {"loss": loss} | variances(prediction, target)

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """Masked image, predicted and true histograms as strokes along the edges, uint8 [3, height, width]."""
        height, width = (side // self.patch for side in batch["image"].shape[2:])
        masked, _ = covered(batch["image"], batch["mask"], self.patch, augment.mean, augment.std)
        both = (by_cell(tokens.float(), (height, width), self.cells) for tokens in (prediction, batch["target"]))
        return sheet([masked, *(strokes(cells) for cells in both)])


def histograms(image: Tensor) -> Tensor:
    """float32 [B, 3, H, W] -> [B, 3, 9, H/8, W/8], each histogram of length 1 (or 0 where the image is flat)."""
    channels = image.shape[1]
    kernels = sobel(image.device)[:, None].repeat(channels, 1, 1, 1)
    padded = F.pad(image, (1, 1, 1, 1), mode="reflect")
    across, down = F.conv2d(padded, kernels, groups=channels).unflatten(1, (channels, 2)).unbind(2)
    magnitude = torch.hypot(across, down)
    bins = (torch.atan2(across, down) / math.pi * BINS).floor().long() % BINS
    # Bin after bin: nine times the images at once would be the largest tensor of a small student's step.
    votes = [F.avg_pool2d(magnitude * (bins == number), CELL) for number in range(BINS)]
    return F.normalize(torch.stack(votes, dim=2) * CELL**2, dim=2)


@functools.cache
def sobel(device: torch.device) -> Tensor:
    """The kernels of both axes, float32 [2, 3, 3]; kept, because numbers of Python's reach a GPU with a wait for it."""
    kernel = torch.tensor(SOBEL)
    return torch.stack([kernel, kernel.T]).to(device)


def by_patch(cells: Tensor, side: int) -> Tensor:
    """[B, 3, 9, h*side, w*side] -> [B, h*w, 27*side*side]."""
    tiles = cells.flatten(1, 2).unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 27, h, side, w, side]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def by_cell(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The inverse of by_patch, for a grid (h, w) of patches: [B, h*w, 27*side*side] -> [B, 3, 9, h*side, w*side]."""
    tiles = patches.unflatten(2, (3, BINS, side, side)).unflatten(1, grid)  # [B, h, w, 3, 9, side, side]
    return tiles.permute(0, 3, 4, 1, 5, 2, 6).flatten(5).flatten(3, 4)


def strokes(cells: Tensor) -> Tensor:
    """Histograms [B, 3, 9, h, w] drawn as lines through the centres of their cells: [B, 3, 8*h, 8*w] in 0..1."""
    place = torch.arange(CELL, device=cells.device) - (CELL - 1) / 2
    # Bin b holds gradients of angle (b + 1/2) * pi / 9 from the vertical; the edge is at right angles to them.
    angle = (torch.arange(BINS, device=cells.device) + 0.5) * math.pi / BINS
    off_line = angle.sin()[:, None, None] * place + angle.cos()[:, None, None] * place[:, None]
    lines = (1 - off_line.abs()).clamp(min=0)  # [9, 8, 8]
    drawn = torch.einsum("bcnhw,nij->bchiwj", cells.clamp(min=0), lines)
    return drawn.flatten(4).flatten(2, 3).clamp(max=1)
