"""Rotary positions on two axes (RoPE-Axial: Heo et al., 2024): queries and keys are turned by where they stand.

The first half of a head's channels is turned by the row, the second by the column; channels are taken in pairs
(0, 1), (2, 3), ... Tokens before the patches are not turned.
"""

import torch
from torch import Tensor


def angles(head_width: int, grid: tuple[int, int], prefix: int, base: float) -> Tensor:
    """Cosines, then sines, of each token's angles, float32 [prefix + h*w, d]: d/2 pairs of channels each.

    Pair k of an axis turns by place * base^(-k / (d/4)), k = 0 .. d/4 - 1. Computed in float64.
    """
    count = head_width // 4
    frequency = base ** -(torch.arange(count, dtype=torch.float64) / count)
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    turns = torch.cat([place.reshape(-1, 1).double() * frequency for place in (y, x)], dim=1)
    turns = torch.cat([turns.new_zeros(prefix, 2 * count), turns])
    return torch.cat([turns.cos(), turns.sin()], dim=1).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, H, N, d] turned by rotation [1 or B, 1, N, d] (see angles), in x's type."""
    cosine, sine = rotation.to(x.dtype).chunk(2, dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
