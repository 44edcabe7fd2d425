"""Attention over feature maps (Park and Kim, "How do vision transformers work?", 2022; xxxnell/how-do-vits-work).

Global with strided keys, local as a convolution, and within windows. Maps are channels-last. 1x1 convolutions keep the
shapes of the published weights and are computed as the matrix products they are.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Common, by_head

Padding = Literal["masked", "zero"]


class Attention2d(nn.Module):
    """Every place asks all places of a map; with stride k, keys and values come from a k x k convolution of stride k.

    Queries, keys and values have no bias. forward also returns the weights, which the paper's analyses look at.
    """

    def __init__(self, width: int, heads: int, head_width: int, out: int | None = None, stride: int = 1) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads, self.scale = heads, head_width**-0.5
        self.q = nn.Conv2d(width, inner, 1, bias=False)
        self.kv = nn.Conv2d(width, 2 * inner, stride, stride, bias=False)
        self.proj = nn.Conv2d(inner, width if out is None else out, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, h, w, C] -> [B, h, w, C'] and weights [B, H, h*w, M]; mask [h*w, M] is added to the scores."""
        q, k, v = (by_head(part.flatten(1, 2), self.heads) for part in self._project(x))
        scores = q @ k.transpose(-2, -1) * self.scale
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return self._out(weights @ v, x), weights

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, h, w, I], keys and values [B, h/k, w/k, I]."""
        keys, values = self.kv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).chunk(2, dim=-1)
        return pointwise(x, self.q), keys, values

    def _out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """[B, H, h*w, d] -> [B, h, w, C']."""
        return pointwise(mixed.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]), self.proj)


class ConvAttention2d(Attention2d):
    """Every place asks the kernel x kernel places around it, ``dilation`` apart.

    padding: what stands outside of the map. masked: nothing, those places get no weight. zero: as published, keys and
    values of zero that take part in the softmax with score 0.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        out: int | None = None,
        *,
        kernel: int = 3,
        dilation: int = 1,
        padding: Padding = "masked",
    ) -> None:
        super().__init__(width, heads, head_width, out)
        if dilation * (kernel - 1) % 2:
            raise ValueError(f"a kernel of {kernel} places has no centre: use an odd one")
        self.kernel, self.dilation, self.padding = kernel, dilation, padding

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, h, w, C] -> [B, h, w, C'] and weights [B, H, h*w, kernel**2], windows row by row."""
        projected = self._project(x)
        q = by_head(projected[0].flatten(1, 2), self.heads)[..., None, :]  # [B, H, N, 1, d]
        k, v = (self._windows(part) for part in projected[1:])
        scores = (q @ k.transpose(-2, -1))[..., 0, :] * self.scale
        if self.padding == "masked":
            inside = self._unfold(x.new_ones(1, 1, *x.shape[1:3]))  # [1, kernel**2, N]
            scores = scores.masked_fill(inside.transpose(1, 2)[:, None] == 0, float("-inf"))
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return self._out((weights[..., None, :] @ v)[..., 0, :], x), weights

    def _unfold(self, plane: Tensor) -> Tensor:
        """plane [B, I, h, w] -> its windows [B, I * kernel**2, h*w], zero outside of the map."""
        around = self.dilation * (self.kernel - 1) // 2
        return F.unfold(plane, self.kernel, self.dilation, around)

    def _windows(self, x: Tensor) -> Tensor:
        """Keys or values [B, h, w, I] -> those around each place, [B, H, h*w, kernel**2, d]."""
        windows = self._unfold(x.permute(0, 3, 1, 2))
        return windows.unflatten(1, (self.heads, -1, self.kernel**2)).permute(0, 1, 4, 3, 2)


class LocalAttention(nn.Module):
    """Attention within windows that tile the map, with one table of relative positions for all heads."""

    offsets: Tensor

    def __init__(self, width: int, heads: int, head_width: int, out: int | None = None, window: int = 7) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention2d(width, heads, head_width, out)
        self.pos_embedding = nn.Parameter(torch.randn(2 * window - 1, 2 * window - 1) * 0.02)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        down, across = (place.flatten()[None, :] - place.flatten()[:, None] + window - 1 for place in (y, x))
        # Row of the table for each pair: key minus query, the reverse of Swin's and BeiT's.
        self.register_buffer("offsets", down * (2 * window - 1) + across, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, h, w, C] -> [B, h, w, C'] and weights [B * windows, H, M, M], M = window**2; mask [M, M] is added."""
        batch, height, width, _ = x.shape
        if height % self.window or width % self.window:
            raise ValueError(f"windows of {self.window} do not tile a map of {height}x{width}")
        bias = self.pos_embedding.flatten()[self.offsets]
        tiles = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window)).transpose(2, 3)
        mixed, weights = self.attn(tiles.flatten(0, 2), bias if mask is None else bias + mask)
        mixed = mixed.unflatten(0, (batch, height // self.window, width // self.window))
        return mixed.transpose(2, 3).flatten(3, 4).flatten(1, 2), weights


class OnGrid(nn.Module):
    """Attention over a map as attention over tokens: the patches of the grid, all of them, and no others."""

    def __init__(self, attention: Attention2d, grid: tuple[int, int]) -> None:
        super().__init__()
        self.map, self.grid = attention, grid

    def forward(self, x: Tensor, last: int | None = None, common: Common | None = None, **_: object) -> Tensor:
        """x [B, h*w, D] -> [B, h*w, D]. Attention's other arguments do not apply: nothing is added to qkv."""
        if last is not None or common is not None:
            raise ValueError("only plain attention can compute some tokens alone")
        return self.map(x.unflatten(1, self.grid))[0].flatten(1, 2)


def pointwise(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A 1x1 convolution, channels-last: [..., C] -> [..., C']."""
    return F.linear(x, convolution.weight.flatten(1), convolution.bias)
