"""Re-attention (DeepViT, Zhou et al., 2021): attention maps are mixed across heads after the softmax."""

from torch import Tensor, nn


class ReAttention(nn.Module):
    """BatchNorm over heads of a 1x1 convolution over heads, with bias (zhoudaquan/dvit_repo, models/layers.py).

    In training, statistics run over the batch and the whole N x N map. scale multiplies the result (the original's
    transform_scale is 1/sqrt(d)).
    """

    def __init__(self, heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.matrix = nn.Conv2d(heads, heads, 1)
        self.norm = nn.BatchNorm2d(heads)

    def forward(self, weights: Tensor) -> Tensor:
        """weights [B, H, N, N], rows summing to 1 -> [B, H, N, N], of any sign and sum."""
        return self.norm(self.matrix(weights)) * self.scale
