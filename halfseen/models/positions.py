"""Absolute position tables: MAE's fixed sine-cosine layout, and moving a table to another grid."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos(width: int, grid: tuple[int, int], prefix_rows: int) -> Tensor:
    """MAE's fixed table, float32 [1, prefix_rows + h*w, width]; prefix rows are zero.

    A row is [sin x | cos x | sin y | cos y], each width/4 long with frequencies 10000^(-k/(width/4)): the
    *column* comes first. Computed in float64 and rounded once, as the published tables are.
    """
    if width % 4:
        raise ValueError(f"a sine-cosine table needs a width divisible by 4, not {width}")
    height, length = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(length), indexing="ij")
    parts = []
    for coordinate in (x, y):
        angle = coordinate.reshape(-1, 1).to(torch.float64) * frequency
        parts += [angle.sin(), angle.cos()]
    table = torch.cat([torch.zeros(prefix_rows, width, dtype=torch.float64), torch.cat(parts, dim=1)])
    return table.to(torch.float32)[None]


def resize(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix_rows: int) -> Tensor:
    """Resample a position table to another grid; the very same tensor when the grids are equal.

    table [1, prefix_rows + h*w, D] -> [1, prefix_rows + h'*w', D]. Prefix rows are copied. Bicubic without
    antialiasing and without aligned corners, as MAE and DeiT do.
    """
    if table.shape[1] != prefix_rows + old_grid[0] * old_grid[1]:
        raise ValueError(f"a table of {table.shape[1]} rows is not {prefix_rows} prefix rows and a grid of {old_grid}")
    if old_grid == new_grid:
        return table
    plane = table[:, prefix_rows:].float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    rows = plane.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix_rows], rows], dim=1)


def resize_blocks(table: Tensor, places: int) -> Tensor:
    """Resample a table of square blocks that tile a square (NesT), over the borders of the blocks.

    table [1, T, N, D] -> [1, T, places, D]. As resize, and as timm does it (models/nest.py, resize_pos_embed).
    """
    across, old, new = (math.isqrt(count) for count in (table.shape[1], table.shape[2], places))
    tiles = table.unflatten(2, (old, old)).unflatten(1, (across, across)).transpose(2, 3)  # [1, a, o, a, o, D]
    plane = tiles.flatten(3, 4).flatten(1, 2).flatten(1, 2)
    moved = resize(plane, (across * old, across * old), (across * new, across * new), 0)
    tiles = moved.unflatten(1, (across, new, across, new)).transpose(2, 3)
    return tiles.flatten(3, 4).flatten(1, 2)
