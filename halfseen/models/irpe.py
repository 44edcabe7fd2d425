"""Image relative position encoding (iRPE, Wu et al., 2021; microsoft/Cream, iRPE/DeiT-with-iRPE/irpe.py).

Offsets of two patches fall into few buckets, finely near by and coarsely far away; each bucket has an encoding. It is
added to the scores, as it is (mode bias) or multiplied with the query or key (contextual), or to the values. Names of
tables are those of the original.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .relative import pairs_of

Method = Literal["product", "euclidean", "quant", "cross", "rows", "columns"]
Mode = Literal["contextual", "bias"]


def piecewise(offset: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """g(x) of eq. 18: x itself up to alpha, then growing as the logarithm, at most beta from gamma on; int64.

    Rounded first and cut to a whole number last, as in the code: beta = 3.8 bounds the result by 3.
    """
    far = offset.abs().float().clamp(min=alpha)
    growing = alpha + (far / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    outside = offset.sign() * growing.round().clamp(max=beta)
    return torch.where(offset.abs() <= alpha, offset.float().round(), outside).long()


def bucket_table(method: Method, grid: tuple[int, int], prefix: int, ratio: float) -> Tensor:
    """Bucket of each pair (query, key): int64 [prefix + h*w, prefix + h*w]; offsets are query minus key.

    product: one bucket per pair of row and column step; euclidean: by distance; quant: by squared distance; rows and
    columns: along one axis (cross is the sum of both). A pair with a token before the patches is in the last bucket.
    """
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = (place.flatten()[:, None] - place.flatten()[None, :] for place in (y, x))
    reach = int(beta)

    def step(offset: Tensor) -> Tensor:
        return piecewise(offset, alpha, beta, gamma) + reach

    if method == "product":
        pairs = step(down) * (2 * reach + 1) + step(across)
    elif method == "euclidean":
        pairs = step((down.square() + across.square()).float().sqrt().round())
    elif method == "quant":
        pairs = step(down.square() + across.square())
    else:
        pairs = step(down if method == "rows" else across)
    return F.pad(pairs, (prefix, 0, prefix, 0), value=bucket_count(method, 0, ratio))


def bucket_count(method: Method, prefix: int, ratio: float) -> int:
    """Buckets of a table: 2 int(beta) + 1, squared for product, and one more if tokens stand before the patches."""
    reach = 2 * int(2 * ratio) + 1
    return (reach**2 if method == "product" else reach) + (prefix > 0)


@dataclass(frozen=True)
class Encoding:
    """Which encoding: shared by queries, keys and values of a trunk."""

    method: Method
    mode: Mode
    ratio: float
    heads: int  # tables: the number of attention heads, or 1 for one table shared by all
    width: int  # channels of a head
    grid: tuple[int, int]
    prefix: int


class OnScores(nn.Module):
    """The encoding on keys (or, transposed by the caller, on queries); starts at zero.

    The gather along the last axis is what plain indexing of the flattened scores amounts to, at a fraction of its time
    in both directions: tests/models/irpe_formulations.py compares them.
    """

    buckets: Tensor

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.register_buffer("buckets", _table(encoding), persistent=False)
        count = bucket_count(encoding.method, encoding.prefix, encoding.ratio)
        if encoding.mode == "bias":
            self.lookup_table_bias = nn.Parameter(torch.zeros(encoding.heads, count))
        else:
            self.lookup_table_weight = nn.Parameter(torch.zeros(encoding.heads, encoding.width, count))
        self.mode = encoding.mode

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """x [B, H, N, d], scaled queries -> what to add to the scores, [1 or B, 1 or H, N, N]; present as in Places."""
        buckets = pairs_of(self.buckets, present)
        if self.mode == "bias":
            bias = F.embedding(buckets, self.lookup_table_bias.t()).movedim(-1, -3)
            return bias if present is not None else bias[None]
        each = x @ self.lookup_table_weight  # [B, H, N, buckets]
        rows = buckets if present is None else buckets[:, None]
        return each.gather(-1, rows.expand(*each.shape[:-1], -1))


class OnValues(nn.Module):
    """The contextual encoding on values: weights are summed in each bucket, then multiplied with its encoding."""

    buckets: Tensor

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.register_buffer("buckets", _table(encoding), persistent=False)
        self.count = bucket_count(encoding.method, encoding.prefix, encoding.ratio)
        self.lookup_table_weight = nn.Parameter(torch.zeros(encoding.heads, self.count, encoding.width))

    def forward(self, weights: Tensor, present: Tensor | None = None) -> Tensor:
        """weights [B, H, N, N] -> what to add to the mixed values, [B, H, N, d]; present as in Places."""
        buckets = pairs_of(self.buckets, present)
        rows = (buckets if present is None else buckets[:, None]).expand_as(weights)
        sums = weights.new_zeros(*weights.shape[:-1], self.count).scatter_add(-1, rows, weights)
        return sums @ self.lookup_table_weight


class Cross(nn.Module):
    """The sum of an encoding along rows and one along columns."""

    def __init__(self, rows: nn.Module, columns: nn.Module) -> None:
        super().__init__()
        self.rp_rows, self.rp_cols = rows, columns

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """As the two parts."""
        return self.rp_rows(x, present) + self.rp_cols(x, present)


def encoding_of(encoding: Encoding, on: Literal["scores", "values"]) -> nn.Module:
    """The module of an encoding."""
    kind = OnScores if on == "scores" else OnValues
    if encoding.method != "cross":
        return kind(encoding)
    return Cross(kind(replace(encoding, method="rows")), kind(replace(encoding, method="columns")))


def _table(encoding: Encoding) -> Tensor:
    return bucket_table(encoding.method, encoding.grid, encoding.prefix, encoding.ratio)
