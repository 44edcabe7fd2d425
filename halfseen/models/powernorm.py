"""PowerNorm (Shen et al., 2020; sIncerass/powernorm, mask_powernorm.py): batch statistics without a mean.

Each token is first divided by its root mean square (group scaling), then each channel by the root mean square over the
batch, later by a running one. The backward is the published approximation, not the derivative. With several ranks the
statistics are those of all of them, for which the ranks meet once in the forward and once in the backward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class PowerNorm(nn.Module):
    """A norm over the last axis; buffers are running_phi, ema_gz (see Power) and iters, the training steps seen.

    Up to ``warmup`` training steps a channel is divided by the root mean square of the batch, then by the running one,
    as in evaluation. groups: parts of the channels that group scaling treats apart. alpha: how much of the running
    statistics stays, forward and backward.
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        groups: int = 1,
        warmup: int = 10_000,
        alpha: tuple[float, float] = (0.9, 0.9),
    ) -> None:
        super().__init__()
        self.eps, self.groups, self.warmup, self.alpha = eps, groups, warmup, alpha
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_phi", torch.ones(width))
        self.register_buffer("ema_gz", torch.zeros(width))
        self.register_buffer("iters", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """x [..., C] -> [..., C], float32. counted bool [...]: tokens the statistics are of; None: all."""
        x = x.float()
        parts = x.unflatten(-1, (self.groups, -1))
        x = (parts * (parts.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2)
        if self.training:
            return Power.apply(x, self.weight, self.bias, self, counted)
        return self.weight * x * (self.running_phi + self.eps).rsqrt() + self.bias

    @torch.no_grad()
    def advance(self, square: Tensor) -> Tensor:
        """Count one step, take the batch's mean squares [C] into the running ones, and return what divides this batch.

        While warming up the running value is moved twice, by the plain average of all steps and by the moving one.
        Everything stays on the device.
        """
        keep = self.alpha[0]
        self.iters += 1
        divisor = torch.where(self.iters <= self.warmup, square, self.running_phi)
        average = self.running_phi * (self.iters - 1) / self.iters + square / self.iters
        running = torch.where(self.iters < self.warmup, average, self.running_phi)
        self.running_phi.copy_(keep * running + (1 - keep) * square)
        return divisor


class Power(torch.autograd.Function):
    """z = x / sqrt(phi + eps), y = weight z + bias, with the running approximation of its gradient.

    With g the gradient of z and nu (ema_gz) a running sum of mean(g z): g' = g - (1 - alpha) nu z, nu += mean(g' z),
    and x gets g' / sqrt(mean squares of this batch + eps), also where the forward divided by the running ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: PowerNorm, counted: Tensor | None) -> Tensor:
        """See the class."""
        square = mean_over_ranks(x.square().reshape(-1, x.shape[-1]), counted)
        z = x * (norm.advance(square) + norm.eps).rsqrt()
        ctx.norm = norm
        ctx.save_for_backward(z, square, weight)
        return weight * z + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        z, square, weight = ctx.saved_tensors
        norm = ctx.norm
        g = gradient * weight - (1 - norm.alpha[1]) * norm.ema_gz * z
        norm.ema_gz += mean_over_ranks((g * z).reshape(-1, z.shape[-1]))
        rows = gradient.reshape(-1, z.shape[-1])
        of_weight = (rows * z.reshape(rows.shape)).sum(0)
        return g * (square + norm.eps).rsqrt(), of_weight, rows.sum(0), None, None


def mean_over_ranks(rows: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean of rows [M, C] over all ranks' rows, [C]; of those alone that counted, bool of M numbers, names."""
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    if counted is None and alone:
        return rows.mean(0)
    # Weights, not an index: how many rows it leaves would have to be known on the host.
    weight = rows.new_ones(len(rows), 1) if counted is None else counted.reshape(-1, 1).to(rows.dtype)
    total = torch.cat([(rows * weight).sum(0), weight.sum(0)])
    if not alone:
        dist.all_reduce(total)
    return total[:-1] / total[-1]
