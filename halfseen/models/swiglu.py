"""The gated MLP of SwiGLU (Shazeer, 2020), with the parameters of a plain one."""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g(x)) * fc1_x(x)); names as in timm's SwiGLU.

    Three maps instead of two: the hidden width is 2/3 of the one asked for, rounded up to a multiple of 8.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        gated = -(-hidden * 2 // 24) * 8
        self.fc1_g = nn.Linear(width, gated)
        self.fc1_x = nn.Linear(width, gated)
        self.fc2 = nn.Linear(gated, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))
