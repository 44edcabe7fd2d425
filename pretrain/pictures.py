"""Pictures of what a student has learned: masked, reconstructed and original images side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .patches import patchify, standardise, unpatchify

GREY = 0.5  # brightness of hidden patches
GAP = 4  # white pixels between pictures


@torch.no_grad()
def triplets(
    image: Tensor,
    mask: Tensor,
    prediction: Tensor,
    patch: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """One row per image: masked | reconstructed | original.

    image float [B, 3, H, W] as the student saw it (normalised by mean and std), mask bool [B, N] True = hidden,
    prediction float [B, N, P*P*3] -> uint8 [3, height, width] on the CPU. Visible patches of the reconstruction
    are the image's own. With norm_pix a prediction is relative to its patch's mean and deviation, which are taken
    from the original: the picture shows what structure was predicted, not whether brightness could be.
    """
    patches = patchify(image.float(), patch)
    predicted = prediction.float()
    if norm_pix:
        _, centre, deviation = standardise(patches)
        predicted = predicted * deviation + centre
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    restored = unpatchify(torch.where(mask[:, :, None], predicted, patches), patch, grid)
    masked, original = covered(image, mask, patch, mean, std)
    return sheet([masked, brightness(restored, mean, std), original])


def covered(
    image: Tensor, mask: Tensor, patch: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Brightness of normalised images [B, 3, H, W] with hidden patches grey, and as they are."""
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    cover = mask.view(-1, 1, *grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    original = brightness(image.float(), mean, std)
    return original.masked_fill(cover, GREY), original


def brightness(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of normalisation: [B, 3, H, W], mostly within 0..1."""
    shape = (1, 3, 1, 1)
    return image * image.new_tensor(std).view(shape) + image.new_tensor(mean).view(shape)


def sheet(columns: Sequence[Tensor]) -> Tensor:
    """Columns of pictures [B, 3, H, W] in 0..1, one row per image -> uint8 [3, height, width] on the CPU."""
    rows = torch.cat([F.pad(column, (GAP, 0, GAP, 0), value=1.0) for column in columns], dim=3)
    whole = F.pad(torch.cat(list(rows), dim=1), (0, GAP, 0, GAP), value=1.0)
    return (whole.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
