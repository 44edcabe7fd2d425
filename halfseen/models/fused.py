"""Parallel blocks as wide ones, for inference on few images.

The branches of a parallel block read one input, and their norms differ in weight and bias alone. Folded into the maps
that follow, n attentions are one with n times the heads, n MLPs one of n times the hidden width, and the sum of the
branches is part of the last product. Few large kernels take the place of many small ones.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, attend, by_head
from .block import ParallelBlock
from .feed import Mlp
from .linear import Linear
from .places import Places
from .vit import ViT


def fuse(vit: ViT) -> ViT:
    """A copy of a trunk of parallel blocks for evaluation, its branches fused; the given one stays as it is.

    Raises ValueError for a trunk without parallel blocks, or with parts that cannot be folded: other attention than
    softmax, MLPs than GELU's, norms than LayerNorm.
    """
    fused = copy.deepcopy(vit).eval()
    fused.blocks = nn.ModuleList(FusedBlock(block) for block in fused.blocks)
    return fused.requires_grad_(False)


class FusedBlock(nn.Module):
    """What a parallel block computes in evaluation, with all branches at once."""

    @torch.no_grad()
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if not isinstance(block, ParallelBlock):
            raise ValueError(
                f"a {type(block).__name__} has no branches to fuse: build the trunk with model.parallel > 1"
            )
        attentions = [parts_of(branch.norm, branch.attn, Attention, branch.ls) for branch in block.attns]
        mlps = [parts_of(branch.norm, branch.mlp, Mlp, branch.ls) for branch in block.ffns]
        norm = attentions[0][0]
        self.width, self.eps, self.peg = norm.normalized_shape, norm.eps, block.peg
        self.heads = sum(attention.heads for _, attention, _ in attentions)
        # Queries of all branches first, then keys, then values: the order in which one wide attention has them.
        entering = [entered(norm, attention.qkv) for norm, attention, _ in attentions]
        weight, bias = (torch.stack(parts).unflatten(1, (3, -1)).transpose(0, 1) for parts in zip(*entering))
        self.qkv = linear(weight.flatten(0, 2), bias.flatten())
        self.proj = summed([(attention.proj, scale) for _, attention, scale in attentions])
        entering = [entered(norm, mlp.fc1) for norm, mlp, _ in mlps]
        self.fc1 = linear(*(torch.cat(parts) for parts in zip(*entering)))
        self.fc2 = summed([(mlp.fc2, scale) for _, mlp, scale in mlps])

    def forward(self, x: Tensor, repetition: int | None = None, *, places: Places | None = None) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        qkv = self.qkv(self._normed(x)).chunk(3, dim=-1)
        q, k, v = (by_head(part, self.heads) for part in qkv)
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self._normed(x))))
        return x if self.peg is None else self.peg(x)

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.width, eps=self.eps)


def parts_of(norm: Any, map_: Any, kind: type[nn.Module], scale: Any) -> tuple[nn.LayerNorm, Any, Tensor | float]:
    """A branch's norm, attention or MLP, and LayerScale (1 without); ValueError if it cannot be folded."""
    linear_maps = all(type(part) in (nn.Linear, Linear) for part in map_.children())
    if type(norm) is not nn.LayerNorm or type(map_) is not kind or not linear_maps:
        raise ValueError(f"{type(norm).__name__} and {type(map_).__name__} cannot be folded into a wide block")
    return norm, map_, 1.0 if isinstance(scale, nn.Identity) else scale.gamma


def entered(norm: nn.LayerNorm, after: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight [E, D] and bias [E] of a map that does what the norm's weight and bias and then ``after`` do."""
    offset = after.weight @ norm.bias
    return after.weight * norm.weight, offset if after.bias is None else offset + after.bias


def summed(branches: list[tuple[nn.Linear, Tensor | float]]) -> nn.Linear:
    """One map from all branches side by side to the sum of their scaled results."""
    weights = [branch.weight * (scale if isinstance(scale, float) else scale[:, None]) for branch, scale in branches]
    return linear(torch.cat(weights, dim=1), torch.stack([branch.bias * scale for branch, scale in branches]).sum(0))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear map with weight [E, D] and bias [E]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made
