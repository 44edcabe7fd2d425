"""Transformer blocks: pre-norm residual branches, sequential, n side by side, or shared over depth."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import Attention, Common
from .feed import Mlp, feed
from .norm import LayerScale
from .places import Places

SKIP_FROM = 0.1  # drop-path rate from which leaving samples out is faster than multiplying them by zero


def add_branch(base: Tensor, x: Tensor, branch: Callable[[Tensor], Tensor], rate: float, every: bool = False) -> Tensor:
    """base + branch(x), the branch of each sample dropped with probability rate, else scaled by 1/(1-rate).

    base [B, M, D], x [B, N, D], branch(x) [B, M, D] -> [B, M, D]. Samples are dropped independently of each
    other. From SKIP_FROM on, dropped samples are left out of the computation: their number is drawn on the
    host and which ones on the device -- the same distribution, and no waiting for the device. every: the branch is
    to see every sample all the same.
    """
    if rate == 0.0:
        return base + branch(x)
    batch = x.shape[0]
    if every or torch.compiler.is_compiling() or rate < SKIP_FROM:  # compiled code wants fixed shapes
        keep = torch.rand(batch, 1, 1, device=x.device) >= rate
        return base + branch(x) * (keep / (1.0 - rate))
    count = int((torch.rand(batch) >= rate).sum())
    # With every sample dropped one still runs, at weight 0: each parameter has a gradient on each rank.
    chosen = torch.rand(batch, device=x.device).argsort()[: max(count, 1)]
    change = branch(x.index_select(0, chosen)).to(base.dtype)
    return base.index_add(0, chosen, change, alpha=1.0 / (1.0 - rate) if count else 0.0)


Make = Callable[[], nn.Module]
NormPlace = Literal["pre", "post", "res_post"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    norm_place: pre as above; post: norm(x + f(x)); res_post: x + norm(f(x)). attention, mlp and norm make the parts
    where they are not the plain ones. peg stands behind the block.

    One module may stand for several consecutive blocks (rates has one entry per repetition): attention and
    MLP weights are shared, norms, LayerScale and drop-path rates are each repetition's own. The repetition is
    an argument, so nothing is remembered between calls; without it the module runs all of them in one call, for
    which an engine that shards gathers and reduces the shared weights once.
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
        attention: Make | None = None,
        mlp: Make | None = None,
        norm: Make | None = None,
        norm_place: NormPlace = "pre",
        peg: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # A list: a compiler takes the numbers of a tuple for constants, and would compile each block anew for its own.
        self.rates, self.norm_place = list(rates), norm_place
        shared = len(rates) > 1

        def each(make: Make) -> nn.Module:
            return nn.ModuleList([make() for _ in rates]) if shared else make()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

        norm = norm or (lambda: nn.LayerNorm(width, eps=eps))
        self.norm1 = each(norm)
        self.attn = attention() if attention else Attention(width, heads, qkv_bias)
        self.ls1 = each(scale)
        self.norm2 = each(norm)
        self.mlp = mlp() if mlp else Mlp(width, hidden)
        self.ls2 = each(scale)
        self.peg = peg

    def forward(
        self,
        x: Tensor,
        repetition: int | None = None,
        last: int | None = None,
        common: Common | None = None,
        *,
        places: Places | None = None,
        trace: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor], list[Tensor]]:
        """x [B, N, D] -> [B, N, D], or the last so many tokens of it alone, [B, last, D].

        repetition: one of them; None: all in turn. common (rows, index): the caller's word that the tokens at the
        end of x are rows[index]. The result is the same. Drop path and common exclude each other. places: see
        Places. trace: also return, for each repetition, its result and the queries, keys and values [B, N, 3D] of its
        attention.
        """
        states: list[Tensor] = []
        qkv: list[Tensor] | None = [] if trace else None
        if repetition is None:
            *earlier, repetition = range(len(self.rates))
            for number in earlier:
                x, common = self._once(x, number, None, common, places, qkv), None
                states.append(x)
        x = self._once(x, repetition, last, common, places, qkv)
        x = x if self.peg is None else self.peg(x)
        return x if qkv is None else (x, [*states, x], qkv)

    def _once(
        self,
        x: Tensor,
        repetition: int,
        last: int | None,
        common: Common | None,
        places: Places | None,
        qkv: list[Tensor] | None,
    ) -> Tensor:
        """One repetition; the arguments are forward's, with trace as the list to which attention adds."""
        norm1, ls1, norm2, ls2 = (one_of(m, repetition) for m in (self.norm1, self.ls1, self.norm2, self.ls2))
        rate = self.rates[repetition] if self.training else 0.0
        if self.norm_place != "pre" and (last is not None or common is not None):
            raise ValueError("only a pre-norm block can compute some tokens alone")
        base = x if last is None else x[:, -last:]
        if common is not None:
            if rate:
                raise ValueError("samples cannot be dropped and have tokens in common at once: set drop_path to 0")
            rows, index = common
            own_tokens = norm1(x[:, : -index.shape[1]])
            x = base + ls1(self.attn(own_tokens, last, (norm1(rows), index)))
            return add_branch(x, x, lambda x: ls2(feed(x, norm2, self.mlp)), rate)

        def attention(x: Tensor) -> Tensor:
            return self.attn(x, last, places=places, repetition=repetition, qkv=qkv)

        # Each sample's places, and the rows of a trace, belong to the whole batch: no sample may be left out of it.
        every = qkv is not None or (places is not None and places.present is not None)
        if self.norm_place == "pre":
            x = add_branch(base, x, lambda x: ls1(attention(norm1(x))), rate, every)
            return add_branch(x, x, lambda x: ls2(feed(x, norm2, self.mlp)), rate)
        if self.norm_place == "post":
            x = norm1(add_branch(x, x, lambda x: ls1(attention(x)), rate, every))
            return norm2(add_branch(x, x, lambda x: ls2(self.mlp(x)), rate))
        x = add_branch(x, x, lambda x: ls1(norm1(attention(x))), rate, every)
        return add_branch(x, x, lambda x: ls2(norm2(self.mlp(x))), rate)


def one_of(module: Any, repetition: int) -> Any:
    """What a repetition of a shared block has of its own: its entry of a list, or the module (or None) all share."""
    return module[repetition] if isinstance(module, nn.ModuleList) else module


class _Attending(nn.Module):
    """One attention branch of a parallel block."""

    def __init__(self, width: int, attention: nn.Module, norm: nn.Module, layer_scale: float | None) -> None:
        super().__init__()
        self.norm = norm
        self.attn = attention
        self.ls = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor, places: Places | None = None) -> Tensor:
        """x [B, N, D] -> what is added to it, [B, N, D]."""
        return self.ls(self.attn(self.norm(x), places=places))


class _Feeding(nn.Module):
    """One MLP branch of a parallel block."""

    def __init__(self, width: int, mlp: nn.Module, norm: nn.Module, layer_scale: float | None) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp
        self.ls = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor, places: Places | None = None) -> Tensor:
        """x [B, N, D] -> what is added to it, [B, N, D]; places do not matter here."""
        return self.ls(feed(x, self.norm, self.mlp))


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
        attention: Make | None = None,
        mlp: Make | None = None,
        norm: Make | None = None,
        peg: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.rate, self.peg = rate, peg
        attention = attention or (lambda: Attention(width, heads, qkv_bias))
        mlp = mlp or (lambda: Mlp(width, hidden))
        norm = norm or (lambda: nn.LayerNorm(width, eps=eps))
        self.attns = nn.ModuleList(_Attending(width, attention(), norm(), layer_scale) for _ in range(branches))
        self.ffns = nn.ModuleList(_Feeding(width, mlp(), norm(), layer_scale) for _ in range(branches))

    def forward(
        self, x: Tensor, repetition: int | None = None, *, places: Places | None = None, trace: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor], list[Tensor]]:
        """x [B, N, D] -> [B, N, D]; a parallel block is never repeated. trace: as Block's, without the queries."""
        if repetition:
            raise ValueError("a parallel block has one repetition")
        rate = self.rate if self.training else 0.0
        every = places is not None and places.present is not None
        for branches in (self.attns, self.ffns):
            shared_input = x
            for branch in branches:
                x = add_branch(x, shared_input, functools.partial(branch, places=places), rate, every)
        x = x if self.peg is None else self.peg(x)
        return (x, [x], []) if trace else x
