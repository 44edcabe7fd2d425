"""Which patches are hidden: a function of (seed, position), on the device, the same count in every sample."""

import torch
from torch import Tensor

from .hashing import uniform


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


def split(mask: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Token numbers of the visible and of the hidden patches, both ascending.

    mask bool [B, N] with ``visible`` False entries in every row -> int64 [B, visible] and [B, N - visible].
    The count is given, not read from the mask: reading it would wait for the device.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :visible], order[:, visible:]
