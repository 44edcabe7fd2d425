"""Norms over the last axis, the channels; tokens and feature maps are kept channels-last throughout."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm2d of a channels-last map: statistics over every axis but the last; nn.BatchNorm2d's keys."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm with statistics over all ranks; on one rank, and in evaluation, the same as BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)

    @classmethod
    def of(cls, norm: BatchNorm) -> "SyncBatchNorm":
        """The same norm, sharing parameters and statistics."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made._parameters, made._buffers = norm._parameters, norm._buffers
        return made.train(norm.training)


def synchronise(student: nn.Module) -> nn.Module:
    """The student with statistics over all ranks in every batch norm; names and tensors stay as they are.

    nn.SyncBatchNorm.convert_sync_batchnorm alone would take the second axis of our channels-last maps for the channels.
    """
    for parent in list(student.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm):
                setattr(parent, name, SyncBatchNorm.of(child))
            elif isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return student


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
