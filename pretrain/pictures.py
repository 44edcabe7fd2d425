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
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    patches = patchify(image.float(), patch)
    predicted = prediction.float()
    if norm_pix:
        _, centre, deviation = standardise(patches)
        predicted = predicted * deviation + centre
    hidden = mask[:, :, None]
    restored = unpatchify(torch.where(hidden, predicted, patches), patch, grid)
    cover = unpatchify(hidden.expand_as(patches), patch, grid)

    def brightness(picture: Tensor) -> Tensor:
        shape = (1, 3, 1, 1)
        return picture * picture.new_tensor(std).view(shape) + picture.new_tensor(mean).view(shape)

    original = brightness(image.float())
    columns = [original.masked_fill(cover, GREY), brightness(restored), original]
    rows = torch.cat([F.pad(column, (GAP, 0, GAP, 0), value=1.0) for column in columns], dim=3)
    sheet = F.pad(torch.cat(list(rows), dim=1), (0, GAP, 0, GAP), value=1.0)
    return (sheet.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
