"""Attention with everything that acts on its scores; plain attention stays in attention.py, as fast as it is.

In this order: q k^T / sqrt(d), iRPE on keys and queries, relative position bias, first head mixing, softmax, second
head mixing, re-attention, dropout, values, iRPE on values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, Common, attend
from .block import one_of
from .irpe import Encoding, encoding_of
from .places import Places
from .reattention import ReAttention
from .relative import bias_of, relative_index, relative_rows
from .rotary import rotate


@dataclass(frozen=True)
class Parts:
    """Which parts an attention has."""

    key_bias: bool = True  # False: biases on queries and values alone, apart from the map (BEiT's q_bias, v_bias)
    relative: tuple[tuple[int, int], int] | None = None  # grid and prefix tokens of a relative table of its own (BEiT)
    irpe: Encoding | None = None  # image relative position encoding ...
    irpe_on: str = ""  # ... on these of q, k and v
    mixing: bool | None = None  # MiniViT's maps over heads before and after the softmax: with bias (True) or without
    reattention: bool = False  # DeepViT's map over heads and batch norm after the softmax
    repetitions: int = 1  # blocks that share this attention: irpe, mixing and re-attention are each one's own


class HeadMixing(nn.Module):
    """A linear map over heads (talking heads; MiniViT's F1 and F2). Starts near zero, N(0, 0.02), as published."""

    def __init__(self, heads: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, heads))
        self.bias = nn.Parameter(torch.zeros(heads)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, scores: Tensor) -> Tensor:
        """scores [B, H, N, N] -> [B, H, N, N]."""
        mixed = (self.weight @ scores.flatten(2)).view_as(scores)
        return mixed if self.bias is None else mixed + self.bias[:, None, None]


class GeneralAttention(Attention):
    """Softmax attention with parts of choice; names as in timm's Beit and CaiT and in DeepViT, where they are equal."""

    relative_position_index: Tensor

    def __init__(
        self, width: int, heads: int, qkv_bias: bool = True, parts: Parts = Parts(), dropout: float = 0.0
    ) -> None:
        super().__init__(width, heads, qkv_bias and parts.key_bias, dropout)
        apart = qkv_bias and not parts.key_bias
        self.q_bias = nn.Parameter(torch.zeros(width)) if apart else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if apart else None
        self.relative_position_bias_table = None
        if parts.relative is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows(*parts.relative), heads))
            self.register_buffer("relative_position_index", relative_index(*parts.relative), persistent=False)

        def each(wanted: bool, make: Callable[[], nn.Module]) -> nn.Module | None:
            if not wanted:
                return None
            return make() if parts.repetitions == 1 else nn.ModuleList(make() for _ in range(parts.repetitions))

        def irpe(on: str) -> nn.Module | None:
            encoding = parts.irpe
            if encoding is None or on not in parts.irpe_on:
                return None
            return each(True, lambda: encoding_of(encoding, "values" if on == "v" else "scores"))

        self.rpe_q, self.rpe_k, self.rpe_v = irpe("q"), irpe("k"), irpe("v")
        self.proj_l = each(parts.mixing is not None, lambda: HeadMixing(heads, bool(parts.mixing)))
        self.proj_w = each(parts.mixing is not None, lambda: HeadMixing(heads, bool(parts.mixing)))
        self.reattention = each(parts.reattention, lambda: ReAttention(heads))
        seen = (self.rpe_q, self.rpe_k, self.rpe_v, self.proj_l, self.reattention)
        self.scores_are_seen = any(part is not None for part in seen)

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
        """x [B, N, D] -> [B, N, D]; the arguments are Attention's, without last and common."""
        if last is not None or common is not None:
            raise ValueError("only plain attention can compute some tokens alone")
        places = Places() if places is None else places
        projected = self._project(x)
        if qkv is not None:
            qkv.append(projected)
        q, k, v = self._turned(projected, places)
        bias = self._bias(places)
        if self.scores_are_seen:
            mixed = self._weigh(q, k, v, bias, places, repetition)
        else:
            mixed = attend(q, k, v, bias, self._dropout)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def probabilities(self, x: Tensor, places: Places | None = None, repetition: int = 0) -> Tensor:
        """As Attention's, [B, H, N, N]: after what acts on scores, and before what mixes the maps of the softmax."""
        places = Places() if places is None else places
        q, k, _ = self._turned(self._project(x), places)
        return self._scores(q, k, self._bias(places), places, repetition).softmax(-1)

    def _project(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> queries, keys and values [B, N, 3D]."""
        projected = self.qkv(x)
        if self.q_bias is None or self.v_bias is None:
            return projected
        return projected + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def _turned(self, projected: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' queries, keys and values [B, H, N, d], the first two turned by their places."""
        q, k, v = self._split(projected, 3)
        return (q, k, v) if places.rotation is None else (rotate(q, places.rotation), rotate(k, places.rotation), v)

    def _scores(self, q: Tensor, k: Tensor, bias: Tensor | None, places: Places, repetition: int) -> Tensor:
        """What the softmax is applied to, [B, H, N, N], formed one part after the other."""
        scale = q.shape[-1] ** -0.5
        q = q * scale
        scores = q @ k.transpose(-2, -1)
        if (rpe := one_of(self.rpe_k, repetition)) is not None:
            scores = scores + rpe(q, places.present)
        if (rpe := one_of(self.rpe_q, repetition)) is not None:
            scores = scores + rpe(k * scale, places.present).transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        mixing = one_of(self.proj_l, repetition)
        return scores if mixing is None else mixing(scores)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, places: Places, repetition: int) -> Tensor:
        """The values [B, H, N, d], weighted by scores that are seen on the way."""
        weights = self._scores(q, k, bias, places, repetition).softmax(-1)
        for part in (one_of(self.proj_w, repetition), one_of(self.reattention, repetition)):
            weights = weights if part is None else part(weights)
        weights = F.dropout(weights, self.dropout, self.training)
        mixed = weights @ v
        if (rpe := one_of(self.rpe_v, repetition)) is not None:
            mixed = mixed + rpe(weights, places.present)
        return mixed

    def _bias(self, places: Places) -> Tensor | None:
        """Relative position bias: of all blocks, its own, or both: [1 or B, H, N, N]."""
        bias = places.bias
        if self.relative_position_bias_table is not None:
            own = bias_of(self.relative_position_bias_table, self.relative_position_index, places.present)
            bias = own if bias is None else bias + own
        return bias
