"""How a config's mask is drawn: on the device, or, where it is drawn piece by piece, by the loader's workers."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfseen.config import ConfigError
from halfseen.data.masks import block_masks, coarse_mask, grid_mask, random_mask

from .config import Pretrain

Draw = Callable[[int, Tensor], Tensor]  # (seed, positions int64 [B]) -> bool [B, N] there, True = hidden
HostDraw = Callable[[Sequence[int]], Tensor]  # positions -> bool [B, N] on the CPU

BLOCK = ("block", "block_v1")
EVEN = ("random", "block", "coarse", "grid")  # kinds that hide equally many patches of every image


def hidden(config: Pretrain) -> int:
    """Patches hidden in each image, of block_v1 the most of them. ConfigError if the mask cannot be."""
    mask, tokens = config.mask, math.prod(config.grid)
    if mask.kind == "none":
        return 0
    if mask.kind not in ("coarse", "grid"):
        return mask.hidden(tokens)
    side = cell(config)
    cells = tokens // side**2
    if mask.count is not None:
        raise ConfigError(
            "mask.count", mask.count, f"a {mask.kind} mask hides whole cells", "use mask.ratio or mask.cell"
        )
    shown = cells if mask.kind == "grid" else side**2 * (cells - hidden_cells(config))
    if not 0 < shown < tokens:
        key, value = ("mask.cell", mask.cell) if mask.kind == "grid" else ("mask.ratio", mask.ratio)
        raise ConfigError(key, value, f"leaves {shown} of {tokens} patches visible", "leave some visible, hide some")
    return tokens - shown


def cell(config: Pretrain) -> int:
    """Patches on a cell's side. ConfigError unless cells tile the image."""
    side, rest = divmod(config.mask.cell, config.patch)
    height, width = config.grid
    if rest or not side or height % side or width % side:
        sizes = [n * config.patch for n in range(1, min(height, width) + 1) if height % n == 0 == width % n]
        reason = f"is no whole number of patches of {config.patch} pixels that tiles {height} x {width} of them"
        raise ConfigError("mask.cell", config.mask.cell, reason, f"use one of {sizes}")
    return side


def hidden_cells(config: Pretrain) -> int:
    """Cells that a coarse mask hides: SimMIM rounds up."""
    return math.ceil(config.mask.ratio * (math.prod(config.grid) // cell(config) ** 2))


def create(config: Pretrain) -> Draw:
    """The mask a config names, for positions on any device."""
    grid, kind, count = config.grid, config.mask.kind, hidden(config)
    tokens = math.prod(grid)
    if kind == "none":
        return lambda seed, positions: torch.zeros(len(positions), tokens, dtype=torch.bool, device=positions.device)
    if kind == "random":
        return lambda seed, positions: random_mask(seed, positions, tokens, count)
    if kind == "coarse":
        side, cells = cell(config), hidden_cells(config)
        return lambda seed, positions: coarse_mask(seed, positions, grid, side, cells)
    if kind == "grid":
        side = cell(config)
        return lambda seed, positions: grid_mask(seed, positions, grid, side)
    draw = blocks(config)
    return lambda seed, positions: draw(seed, positions.tolist()).to(positions.device)


def host(config: Pretrain) -> HostDraw | None:
    """What a loader's worker draws for its batch; None where the device draws the mask itself."""
    return functools.partial(blocks(config), config.run.seed) if config.mask.kind in BLOCK else None


def blocks(config: Pretrain) -> Callable[[int, Sequence[int]], Tensor]:
    """Draws block masks. A partial of a function, so that it travels to worker processes."""
    mask = config.mask
    return functools.partial(
        block_masks,
        grid=config.grid,
        hidden=hidden(config),
        smallest=mask.min_block,
        largest=mask.max_block,
        aspects=(mask.min_aspect, 1 / mask.min_aspect),
        exact=mask.kind == "block",
    )
