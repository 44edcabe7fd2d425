"""Signs of collapse, cheap enough for every step: no eigenvalues, no waiting for the device."""

import torch
from torch import Tensor


@torch.no_grad()
def feature_rank(features: Tensor) -> Tensor:
    """How many directions the features of a micro-batch use: [B, D] -> a scalar from 1 to min(B - 1, D).

    The participation ratio (sum of the covariance's eigenvalues)^2 / sum of their squares, from the B x B products
    alone. Near 1 when all images are the same to the student. It grows with B, so compare it with itself.
    """
    features = features.float()
    centred = features - features.mean(0)
    # The ratio has no scale. At norm 1 nothing overflows where autocast multiplies in half precision.
    centred = centred / centred.norm().clamp(min=1e-20)
    products = (centred @ centred.T).float()
    return products.trace().square() / products.square().sum().clamp(min=1e-20)


FEW = 8  # images of a micro-batch that tell how much pixels differ: thousands of patches are not copied to count that


def variances(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How much predictions and targets of plain pixels differ from patch to patch; both [B, M, C]."""
    return {"prediction_variance": spread(prediction[:FEW]), "target_variance": spread(target[:FEW])}


@torch.no_grad()
def spread(values: Tensor) -> Tensor:
    """Mean over channels of the variance over all patches: [..., C] -> a scalar; 0 when every patch is the same."""
    return values.float().flatten(0, -2).var(0, unbiased=False).mean()
