"""Where the tokens of one forward pass stand: made once by the trunk, read by the attention of every block."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Places:
    """What attention needs to know besides the tokens' values."""

    present: Tensor | None = None  # int64 [B, M]: numbers of the tokens each sample has, prefix first; None: all N
    bias: Tensor | None = None  # [1, H, N, N] or [B, H, M, M], added to the scores of every block
    rotation: Tensor | None = None  # [1, 1, N, d] or [B, 1, M, d]: cosines, then sines, of RoPE's angles
