"""Which patches are hidden: a function of (seed, position), whoever computes it.

Every mask is bool [B, N] or [B, h*w], True = hidden. Masks whose patches are drawn all at once are made on the device
of the positions. Block masks are drawn rectangle after rectangle, each depending on those before it: Python makes them,
best in a loader's worker.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .hashing import generator, uniform

Grid = tuple[int, int]  # patches down and across
TRIES = 10  # rectangles that are tried before a block mask is given up
ASPECTS = (0.3, 1 / 0.3)  # BEiT's lowest and highest height over width of a rectangle


def random_mask(seed: int, positions: Tensor, tokens: int, hidden: int) -> Tensor:
    """MAE's uniform mask: exactly ``hidden`` of the tokens of each sample, every subset equally likely.

    positions int64 [B] -> bool [B, tokens] on the same device, True = hidden.
    """
    return mask_from_noise(uniform(seed, positions, tokens, "mask"), hidden)


def mask_from_noise(noise: Tensor, hidden: int) -> Tensor:
    """MAE's rule for noise [B, N]: the smallest values stay visible. Returns bool [B, N], True = hidden.

    Equal values are taken in token order, so that every device agrees and the count is exact.
    """
    if not 0 <= hidden <= noise.shape[1]:
        raise ValueError(f"cannot hide {hidden} of {noise.shape[1]} tokens")
    order = noise.argsort(dim=1, stable=True)
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device)
    return mask.scatter_(1, order[:, noise.shape[1] - hidden :], True)


def coarse_mask(seed: int, positions: Tensor, grid: Grid, cell: int, hidden: int) -> Tensor:
    """SimMIM's mask: ``hidden`` of the square cells of cell x cell patches, whole, every choice equally likely.

    positions int64 [B] -> bool [B, h*w] on the same device. The cell's side must divide the grid's.
    """
    return spread_cells(random_mask(seed, positions, math.prod(cells_of(grid, cell)), hidden), grid, cell)


def cells_of(grid: Grid, cell: int) -> Grid:
    """Square cells of cell x cell patches down and across a grid. Raises ValueError unless they tile it."""
    if grid[0] % cell or grid[1] % cell:
        raise ValueError(f"cells of {cell} x {cell} patches do not tile a grid of {grid}")
    return grid[0] // cell, grid[1] // cell


def spread_cells(cells: Tensor, grid: Grid, cell: int) -> Tensor:
    """A mask of cells [B, (h/cell)*(w/cell)] as one of patches, [B, h*w]."""
    height, width = cells_of(grid, cell)
    plane = cells.view(-1, height, 1, width, 1).expand(-1, -1, cell, -1, cell)
    return plane.reshape(len(cells), -1)


def grid_mask(seed: int, positions: Tensor, grid: Grid, cell: int) -> Tensor:
    """A regular mask: of each square cell of cell x cell patches all but one, at a place drawn for the sample.

    positions int64 [B] -> bool [B, h*w] on the same device. The cell's side must divide the grid's.
    """
    inside = random_mask(seed, positions, cell * cell, cell * cell - 1).view(-1, 1, cell, 1, cell)
    height, width = cells_of(grid, cell)
    return inside.expand(-1, height, -1, width, -1).reshape(len(positions), -1)


# ------------------------------------------------------------------------------------------------- block masks


def block_masks(
    seed: int,
    positions: Sequence[int],
    grid: Grid,
    hidden: int,
    *,
    smallest: int = 16,
    largest: int | None = None,
    aspects: tuple[float, float] = ASPECTS,
    exact: bool = True,
) -> Tensor:
    """BEiT's block-wise masks of samples: bool [B, h*w] on the CPU, a function of (seed, position) for each row.

    exact: exactly ``hidden`` patches (BEiT v2), else at most (BEiT v1). The other arguments are those of block_mask.
    """
    tokens = grid[0] * grid[1]
    rows = np.empty((len(positions), tokens), dtype=np.bool_)
    for row, position in zip(rows, positions):
        rng = generator(seed, position, "mask")
        bits = block_mask(rng, grid, hidden, smallest=smallest, largest=largest, aspects=aspects)
        row[:] = unpack(top_up(bits, tokens, hidden, rng.sample) if exact else bits, tokens)
    return torch.from_numpy(rows)


def block_mask(
    rng: random.Random,
    grid: Grid,
    hidden: int,
    *,
    smallest: int = 16,
    largest: int | None = None,
    aspects: tuple[float, float] = ASPECTS,
) -> int:
    """One mask of rectangles, of at most ``hidden`` patches, as an integer whose bit y*w + x is patch (y, x).

    smallest, largest: area in patches between which rectangles are drawn (None: what is still to be hidden). aspects:
    lowest and highest height over width. It ends early when TRIES rectangles in a row hide nothing new or too much.
    Draws from rng in the order of the original (microsoft/unilm, beit/masking_generator.py), so that a generator
    seeded alike gives the same mask.
    """
    height, width = grid
    shape = (math.log(aspects[0]), math.log(aspects[1]))
    mask, count = 0, 0
    while count < hidden:
        budget = hidden - count if largest is None else min(hidden - count, largest)
        for _ in range(TRIES):
            area = rng.uniform(smallest, budget)
            ratio = math.exp(rng.uniform(*shape))
            down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if across >= width or down >= height:
                continue
            top, left = rng.randint(0, height - down), rng.randint(0, width - across)
            new = rectangle(top, left, down, across, width) & ~mask
            if 0 < new.bit_count() <= budget:
                mask, count = mask | new, count + new.bit_count()
                break
        else:
            break
    return mask


def rectangle(top: int, left: int, down: int, across: int, width: int) -> int:
    """The bits of a rectangle in a grid of so many columns."""
    row = ((1 << across) - 1) << left
    # Rows are `width` bits apart: a number with a 1 at the start of each row, times one row, is all of them.
    starts = ((1 << width * down) - 1) // ((1 << width) - 1)
    return row * starts << width * top


def top_up(mask: int, tokens: int, hidden: int, choose: Callable[[Sequence[int], int], Sequence[int]]) -> int:
    """BEiT v2's rule: hide more patches, chosen uniformly among visible ones, until there are exactly ``hidden``.

    choose(patches, how many) draws without replacement; patches are in ascending order.
    """
    missing = hidden - mask.bit_count()
    if missing:
        visible = [token for token in range(tokens) if not mask >> token & 1]
        for token in choose(visible, missing):
            mask |= 1 << int(token)
    return mask


def unpack(mask: int, tokens: int) -> np.ndarray:
    """The bits of an integer as bool [tokens], lowest first."""
    packed = np.frombuffer(mask.to_bytes(-(-tokens // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=tokens, bitorder="little").view(np.bool_)


# ------------------------------------------------------------------------------------------------- reading masks


def split(mask: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Token numbers of the visible and of the hidden patches, both ascending.

    mask bool [B, N] with ``visible`` False entries in every row -> int64 [B, visible] and [B, N - visible].
    The count is given, not read from the mask: reading it would wait for the device.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :visible], order[:, visible:]
