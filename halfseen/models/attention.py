"""Multi-head self-attention over tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear, linear
from .places import Places

# Rows [M, D] and index int64 [B, K]: K tokens of each sample are rows[index], so that what depends on a token
# alone (norm, query, key, value) is computed M times instead of B*K times, forward and backward.
Common = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Softmax self-attention with one fused qkv map; keys as in timm: qkv, proj."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        last: int | None = None,
        common: Common | None = None,
        *,
        places: Places | None = None,
        repetition: int = 0,
        qkv: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; with ``last``, only that many tokens at the end ask: -> [B, last, D].

        common: more tokens after those of x, which all samples draw from the same rows (see Common). qkv: a list to
        which the queries, keys and values of all tokens, [B, N, 3D], are appended; only without last and common. Places
        and repetition are for attention with more parts (general.py).
        """
        if common is not None:
            rows, index = common
            q, k, v = self._split(torch.cat([self.qkv(x), F.embedding(index, self.qkv(rows))], dim=1), 3)
            q = q if last is None else q[:, :, -last:]
        elif last is None:
            projected = self.qkv(x)
            if qkv is not None:
                qkv.append(projected)
            q, k, v = self._split(projected, 3)
        else:
            # Two views of the fused map; the matrices are never stored apart.
            sizes = [x.shape[-1], 2 * x.shape[-1]]
            weights = self.qkv.weight.split(sizes)
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
            (q,) = self._split(linear(x[:, -last:], weights[0], biases[0]), 1)
            k, v = self._split(linear(x, weights[1], biases[1]), 2)
        return self.proj(attend(q, k, v, dropout=self._dropout).transpose(1, 2).flatten(2))

    @property
    def _dropout(self) -> float:
        """Probability at which weights are dropped now."""
        return self.dropout if self.training else 0.0

    def probabilities(self, x: Tensor, places: Places | None = None, repetition: int = 0) -> Tensor:
        """What the softmax makes of the scores when forward is given x [B, N, D]: [B, H, N, N], rows sum to 1."""
        q, k, _ = self._split(self.qkv(x), 3)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts*D] -> parts tensors [B, H, N, D/H], views."""
        # Chunks of the channels, not of a permuted tensor: their gradients are then put together in one copy.
        return tuple(by_head(part, self.heads) for part in x.chunk(parts, dim=-1))


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*d] -> [B, H, N, d], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v -> [B, H, M, d].

    q [B, H, M, d], k and v [B, H, N, d], bias [1 or B, H, M, N]. dropout: probability at which weights are dropped.
    """
    if not plain(q):
        mask = None if bias is None else bias.to(q.dtype)
        if mask is not None and mask.device.type != "cpu":
            mask = mask.contiguous()  # or no fused kernel of a GPU takes it, and all scores are stored
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    shape, scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    logits = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    if bias is not None:
        logits = (logits.view(*shape[:-1], -1) + bias.to(q.dtype)).flatten(0, 1)
    return torch.bmm(F.dropout(logits.softmax(-1), dropout, training=dropout > 0), v).view(shape)


def plain(x: Tensor) -> bool:
    """Whether plain products beat the fused kernel: in bfloat16 on the CPU its backward is 2.5 to 4 times slower."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16
