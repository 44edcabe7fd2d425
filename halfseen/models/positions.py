"""Absolute position tables: MAE's fixed sine-cosine layout, and moving a table to another grid."""

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
