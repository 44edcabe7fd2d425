"""How a config's mask is drawn."""

from collections.abc import Callable

from torch import Tensor

from halfseen.data.masks import random_mask

from .config import Pretrain

# (seed, positions int64 [B]) -> bool [B, N] on the positions' device, True = hidden
Draw = Callable[[int, Tensor], Tensor]


def create(config: Pretrain) -> Draw:
    """The mask a config names."""
    height, width = config.grid
    tokens = height * width
    hidden = config.mask.hidden(tokens)
    return lambda seed, positions: random_mask(seed, positions, tokens, hidden)
