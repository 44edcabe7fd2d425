"""Transformer blocks: pre-norm residual branches, sequential, n side by side, or shared over depth."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, Common
from .norm import LayerScale

SKIP_FROM = 0.1  # drop-path rate from which leaving samples out is faster than multiplying them by zero


class Mlp(nn.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


def add_branch(base: Tensor, x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """base + branch(x), the branch of each sample dropped with probability rate, else scaled by 1/(1-rate).

    base [B, M, D], x [B, N, D], branch(x) [B, M, D] -> [B, M, D]. Samples are dropped independently of each
    other. From SKIP_FROM on, dropped samples are left out of the computation: their number is drawn on the
    host and which ones on the device -- the same distribution, and no waiting for the device.
    """
    if rate == 0.0:
        return base + branch(x)
    batch = x.shape[0]
    if rate < SKIP_FROM or torch.compiler.is_compiling():  # compiled code wants fixed shapes
        keep = torch.rand(batch, 1, 1, device=x.device) >= rate
        return base + branch(x) * (keep / (1.0 - rate))
    count = int((torch.rand(batch) >= rate).sum())
    # With every sample dropped one still runs, at weight 0: each parameter has a gradient on each rank.
    chosen = torch.rand(batch, device=x.device).argsort()[: max(count, 1)]
    change = branch(x.index_select(0, chosen)).to(base.dtype)
    return base.index_add(0, chosen, change, alpha=1.0 / (1.0 - rate) if count else 0.0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    One module may stand for several consecutive blocks (rates has one entry per repetition): attention and
    MLP weights are shared, norms, LayerScale and drop-path rates are each repetition's own. The repetition is
    an argument, so nothing is remembered between calls.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        rates: tuple[float, ...] = (0.0,),
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.rates = rates
        shared = len(rates) > 1

        def each(make: Callable[[], nn.Module]) -> nn.Module:
            return nn.ModuleList([make() for _ in rates]) if shared else make()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

        self.norm1 = each(lambda: nn.LayerNorm(width, eps=eps))
        self.attn = Attention(width, heads, qkv_bias)
        self.ls1 = each(scale)
        self.norm2 = each(lambda: nn.LayerNorm(width, eps=eps))
        self.mlp = Mlp(width, hidden)
        self.ls2 = each(scale)

    def forward(self, x: Tensor, repetition: int = 0, last: int | None = None, common: Common | None = None) -> Tensor:
        """x [B, N, D] -> [B, N, D], or the last so many tokens of it alone, [B, last, D].

        common (rows, index): the caller's word that the tokens at the end of x are rows[index]. The result is
        the same. Drop path and common exclude each other.
        """

        def own(module: nn.Module) -> nn.Module:
            return module[repetition] if isinstance(module, nn.ModuleList) else module

        norm1, ls1, norm2, ls2 = own(self.norm1), own(self.ls1), own(self.norm2), own(self.ls2)
        rate = self.rates[repetition] if self.training else 0.0
        base = x if last is None else x[:, -last:]
        if common is None:
            x = add_branch(base, x, lambda x: ls1(self.attn(norm1(x), last)), rate)
        elif rate:
            raise ValueError("samples cannot be dropped and have tokens in common at once: set drop_path to 0")
        else:
            rows, index = common
            own_tokens = norm1(x[:, : -index.shape[1]])
            x = base + ls1(self.attn(own_tokens, last, (norm1(rows), index)))
        return add_branch(x, x, lambda x: ls2(self.mlp(norm2(x))), rate)


class _Attending(nn.Module):
    """One attention branch of a parallel block."""

    def __init__(self, width: int, heads: int, layer_scale: float | None, qkv_bias: bool, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.ls = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.ls(self.attn(self.norm(x)))


class _Feeding(nn.Module):
    """One MLP branch of a parallel block."""

    def __init__(self, width: int, hidden: int, layer_scale: float | None, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)
        self.ls = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.ls(self.mlp(self.norm(x)))


class ParallelBlock(nn.Module):
    """n attentions side by side, then n MLPs side by side (Three things, eq. 2).

    Every branch has its own norm, LayerScale and independently drawn drop path. Keys are those of timm's
    ParallelThingsBlock.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        branches: int,
        *,
        rate: float = 0.0,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.rate = rate
        self.attns = nn.ModuleList(_Attending(width, heads, layer_scale, qkv_bias, eps) for _ in range(branches))
        self.ffns = nn.ModuleList(_Feeding(width, hidden, layer_scale, eps) for _ in range(branches))

    def forward(self, x: Tensor, repetition: int = 0) -> Tensor:
        """x [B, N, D] -> [B, N, D]; a parallel block is never repeated."""
        if repetition:
            raise ValueError("a parallel block has one repetition")
        rate = self.rate if self.training else 0.0
        for branches in (self.attns, self.ffns):
            shared_input = x
            for branch in branches:
                x = add_branch(x, shared_input, branch, rate)
        return x
