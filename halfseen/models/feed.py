"""The MLP branch, and a way to keep less of it for the backward when its weights are frozen."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear


class Mlp(nn.Module):
    """Two linear maps around an exact GELU.

    recompute (for frozen weights only): keep nothing but the branch's input for the backward, see Frugal.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


def feed(x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
    """mlp(norm(x)), [B, N, D] -> [B, N, D]."""
    if getattr(mlp, "recompute", False) and torch.is_grad_enabled() and x.requires_grad:
        return Frugal.apply(x, norm, mlp)
    return mlp(norm(x))


class Frugal(torch.autograd.Function):
    """A frozen norm and MLP whose backward computes the first product again.

    The hidden activation, four times as wide as the rest, is not kept, and the second product is not computed again:
    with no gradient of its weights to form, its backward needs those weights alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module, mlp: Mlp) -> Tensor:
        """See ``feed``."""
        refuse_training(norm, mlp)
        ctx.norm, ctx.mlp, ctx.kind = norm, mlp, autocast_type(x)
        ctx.save_for_backward(x)
        return mlp(norm(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x [B, N, D] alone."""
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad(), autocast(x, ctx.kind):
            hidden = F.gelu(ctx.mlp.fc1(ctx.norm(x)))
        inner = gradient.to(hidden.dtype) @ ctx.mlp.fc2.weight.to(hidden.dtype)
        (given,) = torch.autograd.grad(hidden, x, inner)
        return given, None, None


def refuse_training(norm: nn.Module, mlp: Mlp) -> None:
    """Raise ValueError if anything would need a gradient that is not made, or is not here whole."""
    for parameter in (*norm.parameters(), *mlp.parameters()):
        if parameter.requires_grad:
            raise ValueError("only a frozen norm and MLP can recompute: their weights would get no gradient")
    if mlp.fc2.weight.ndim != 2:
        raise ValueError("weights that are gathered module by module cannot be read here: task.recompute_mlp=false")


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type autocast computes in here, or None."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast in a backward as ``autocast_type`` found it in the forward."""
    return torch.autocast(x.device.type, dtype, cache_enabled=False) if dtype else nullcontext()
