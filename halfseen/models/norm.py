"""Norms over the last axis, the channels; tokens and feature maps are kept channels-last throughout."""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm2d of a channels-last map: statistics over every axis but the last; nn.BatchNorm2d's keys."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm with statistics over all GPUs; on one rank, and in evaluation, the same as BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class SummedBatchNorm(_BatchNorm):
    """The same over CPU ranks, for which torch has none: sums are exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        flat = x.reshape(-1, x.shape[-1])
        apart = self.training and distributed.is_initialized()
        return (self._reduced(flat) if apart else super().forward(flat)).view(x.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Rows are all there is."""

    def _reduced(self, x: Tensor) -> Tensor:
        """x [M, C] -> [M, C], by the mean and variance of all ranks' rows; sums are of float64. Collective."""
        each = x.double()
        sums = torch.stack([each.sum(0), each.square().sum(0), torch.full_like(each[0], len(x))])
        total, squares, count = all_reduce(sums)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            unbiased = variance * count / (count - 1).clamp(min=1)
            for kept, value in ((self.running_mean, mean), (self.running_var, unbiased)):
                kept.lerp_(value.detach().to(kept.dtype), share)
        normed = ((each - mean) * (variance + self.eps).rsqrt()).to(x.dtype)
        return normed if self.weight is None else normed * self.weight + self.bias


class SummedBatchNormOfMaps(SummedBatchNorm):
    """The same where the second axis is the channels': in place of torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] -> [B, C, ...]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def synchronise(student: nn.Module, cpu: bool = False) -> nn.Module:
    """The student with statistics over all ranks in every batch norm; names and tensors stay as they are.

    nn.SyncBatchNorm.convert_sync_batchnorm alone would take the second axis of our channels-last maps for the channels.
    """
    done = (nn.SyncBatchNorm, SummedBatchNorm)
    for parent in list(student.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm):
                setattr(parent, name, shared(child, SummedBatchNorm if cpu else SyncBatchNorm))
            elif isinstance(child, _BatchNorm) and not isinstance(child, done):
                setattr(parent, name, shared(child, SummedBatchNormOfMaps if cpu else nn.SyncBatchNorm))
    return student


def shared(norm: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    """The same norm of another kind, with its very parameters and statistics."""
    made = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters, made._buffers = norm._parameters, norm._buffers
    return made.train(norm.training)


def norm_of(kind: str, width: int, eps: float) -> nn.Module:
    """A norm over the last axis. kind: layer, or batch (epsilon 1e-5 as everywhere it was published)."""
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else BatchNorm(width)


class LayerScale(nn.Module):
    """One learned factor per channel on a residual branch (CaiT)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return x * self.gamma
