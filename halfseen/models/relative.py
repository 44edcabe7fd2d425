"""Relative position bias (BEiT): a learned number per head and offset, added to the attention scores.

A table [R, H] has (2h-1)(2w-1) rows, one per offset of two patches of an h x w grid, and three more when there are
tokens before the patches: prefix to patch, patch to prefix, prefix to prefix, in that order (BEiT has one such token;
here all of them share the three rows). Names as in timm's Beit.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX_ROWS = 3  # rows of a table that are about tokens without a place in the grid


def relative_rows(grid: tuple[int, int], prefix: int) -> int:
    """Rows of the table of a grid with ``prefix`` tokens before it."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + (PREFIX_ROWS if prefix else 0)


def relative_index(grid: tuple[int, int], prefix: int) -> Tensor:
    """Row of the table for each pair (query, key): int64 [prefix + h*w, prefix + h*w].

    Row of two patches: (dy + h-1)(2w-1) + dx + w-1, with (dy, dx) the query's place minus the key's.
    """
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = (place.flatten()[:, None] - place.flatten()[None, :] for place in (y, x))
    pairs = (down + height - 1) * (2 * width - 1) + across + width - 1
    if not prefix:
        return pairs
    index = F.pad(pairs, (prefix, 0, prefix, 0))
    first = relative_rows(grid, 0)
    index[:prefix, prefix:] = first
    index[prefix:, :prefix] = first + 1
    index[:prefix, :prefix] = first + 2
    return index


def pairs_of(index: Tensor, present: Tensor | None) -> Tensor:
    """What a table [N, N] of pairs says about the tokens that are there: [N, N], or [B, M, M].

    present int64 [B, M]: numbers of the tokens each sample has; None: all samples have all.
    """
    return index if present is None else index[present[:, :, None], present[:, None, :]]


def bias_of(table: Tensor, index: Tensor, present: Tensor | None) -> Tensor:
    """The bias of every head and pair: [1, H, N, N], or [B, H, M, M] for the tokens present.

    With visible tokens only, the bias differs between samples: it takes B*H*M*M numbers where all tokens together
    take H*N*N -- as much as the attention scores themselves.
    """
    bias = F.embedding(pairs_of(index, present), table)
    return bias.movedim(-1, -3) if present is not None else bias.movedim(-1, -3)[None]


class RelativeBias(nn.Module):
    """One table for all blocks of a trunk; starts at zero."""

    relative_position_index: Tensor

    def __init__(self, heads: int, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows(grid, prefix), heads))
        self.register_buffer("relative_position_index", relative_index(grid, prefix), persistent=False)

    def forward(self, present: Tensor | None = None) -> Tensor:
        """What to add to the scores: [1, H, N, N], or [B, H, M, M] for tokens present int64 [B, M]."""
        return bias_of(self.relative_position_bias_table, self.relative_position_index, present)


# ------------------------------------------------------------------------------------------- moving to another grid


def resize_relative(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a table to another grid; the very same tensor when the grids are equal.

    table [R, H], with or without the rows of prefix tokens, which are copied. BEiT's rule (run_class_finetuning.py),
    for each axis on its own so that grids need not be square: offsets of the old grid are put at geometrically
    growing distances that span those of the new one, and a cubic spline through them is read at whole offsets. An
    axis that keeps its length keeps its values. Computed in float64.
    """
    rows = relative_rows(old_grid, 0)
    if table.shape[0] not in (rows, rows + PREFIX_ROWS):
        raise ValueError(f"a table of {table.shape[0]} rows is not of a grid of {old_grid}: {rows} or 3 more")
    if old_grid == new_grid:
        return table
    old, new = ([2 * side - 1 for side in grid] for grid in (old_grid, new_grid))
    down, across = (spline(geometric(s, t), whole(t)) if s != t else torch.eye(s).double() for s, t in zip(old, new))
    plane = table[:rows].detach().cpu().double().view(old[0], old[1], -1)
    moved = torch.einsum("ts,uv,svh->tuh", down, across, plane).flatten(0, 1)
    return torch.cat([moved.to(table), table[rows:]])


def whole(count: int) -> Tensor:
    """Offsets -(count//2) .. count//2, float64."""
    return torch.arange(count, dtype=torch.float64) - count // 2


def geometric(count: int, spanned: int) -> Tensor:
    """count places 0, +-1, +-(1+q), +-(1+q+q^2), ...: q, found by bisection, makes the last one about spanned//2."""
    low, high, ratio = 1.01, 1.5, 1.255
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (count // 2)) / (1 - ratio) > spanned // 2:
            high = ratio
        else:
            low = ratio
    steps = ratio ** torch.arange(count // 2, dtype=torch.float64)
    side = steps.cumsum(0)
    return torch.cat([-side.flip(0), side.new_zeros(1), side])


def spline(places: Tensor, asked: Tensor) -> Tensor:
    """The matrix [T, S] that takes values at S places to those of their cubic spline at T asked ones, float64.

    The third derivative is continuous at the second and the last but one place ("not a knot"). Outside of the places
    the value at their end is used. Fewer than four places take the polynomial through them.
    """
    if len(places) == 1:
        return places.new_ones(len(asked), 1)
    degree = min(3, len(places) - 1)
    inner = places[2:-2] if degree == 3 else places[:0]
    knots = torch.cat([places[:1].expand(degree + 1), inner, places[-1:].expand(degree + 1)])
    values = basis(knots, degree, places)
    return torch.linalg.solve(values, basis(knots, degree, asked.clamp(places[0], places[-1])), left=False)


def basis(knots: Tensor, degree: int, at: Tensor) -> Tensor:
    """The B-splines of a degree over knots, at T points: [T, len(knots) - degree - 1] (de Boor and Cox)."""
    at = at[:, None]
    # The last point belongs to the last interval that is not empty.
    last = knots[1:] == knots[-1]
    inside = (knots[:-1] <= at) & ((at < knots[1:]) | ((at == knots[-1]) & last & (knots[:-1] < knots[1:])))
    splines = inside.to(knots.dtype)
    for step in range(1, degree + 1):
        length = knots[step:] - knots[:-step]
        share = torch.where(length > 0, (at - knots[:-step]) / length, 0.0)  # of each interval of ``step`` knots
        splines = share[:, :-1] * splines[:, :-1] + (1 - share[:, 1:]) * splines[:, 1:]
    return splines
