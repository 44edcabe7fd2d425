"""The mean of a loss over the patches that count."""

from torch import Tensor


def average(values: Tensor, weight: Tensor | None) -> Tensor:
    """values [...] of each patch -> a float32 scalar; weight float32 [...] sums to 1, None: all equal."""
    return values.float().mean() if weight is None else (values.float() * weight).sum()
