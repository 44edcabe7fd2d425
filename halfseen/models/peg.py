"""Positional encoding generator (PEG, CPVT, Chu et al., 2021): positions from a token's neighbours."""

import torch
from torch import Tensor, nn


class PEG(nn.Module):
    """x plus a depth-wise 3x3 convolution of it over the grid (Meituan-AutoML/Twins, gvt.py, PosCNN).

    The zeros around the map are what tells a token where it stands, so the padding stays zero. stride: of the
    convolution; x is added only for stride 1. Tokens before the patches pass by. Names as in timm's PosConv.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], prefix: int = 0, out: int | None = None, stride: int = 1
    ) -> None:
        super().__init__()
        out = width if out is None else out
        self.proj = nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, groups=out))
        self.grid, self.prefix, self.stride = grid, prefix, stride

    def forward(self, x: Tensor) -> Tensor:
        """x [B, prefix + h*w, C] -> [B, prefix + h'*w', C'], with h' = ceil(h / stride)."""
        prefix = self.prefix
        plane = x[:, prefix:].transpose(1, 2).unflatten(2, self.grid)
        moved = self.proj(plane)
        patches = (moved + plane if self.stride == 1 else moved).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix], patches], dim=1) if prefix else patches
