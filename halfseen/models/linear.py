"""The linear map, and who multiplies its matrices.

PyTorch's wheels multiply float32 matrices on the CPU with MKL, which runs AVX-512 code on Intel's processors only,
and bfloat16 ones with oneDNN, which runs it wherever there is some. On other makers' processors with AVX-512
float32 is therefore given to oneDNN too: the same sums in the same precision, added up in another order.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WORTHWHILE = 2**21  # multiplications from which oneDNN's faster product outweighs its dearer call, forward and backward


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [..., I], weight [O, I], bias [O] -> [..., O]."""
    if by_onednn(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear whose product is ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return linear(x, self.weight, self.bias)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is float32, run eagerly on a CPU, large, and MKL would be slow at it."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    # A compiler makes its own choice, and autocast changes the type inside F.linear.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() * len(weight) >= WORTHWHILE and mkl_lacks_avx512()


@functools.cache
def mkl_lacks_avx512() -> bool:
    """Whether this processor has AVX-512, PyTorch is built with MKL and oneDNN, and MKL does not use it."""
    info = Path("/proc/cpuinfo")
    made_by_intel = not info.exists() or "GenuineIntel" in info.read_text()
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return built and not made_by_intel and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class _Linear(torch.autograd.Function):
    """A linear map of three products by oneDNN. Keeps what F.linear keeps: nothing for what is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_wanted, weight_wanted, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_wanted else None, weight if x_wanted else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = None if weight is None else _product(gradient, weight.t())
        of_weight = None if x is None else _product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]; neither tensor need be contiguous."""
    # What torch.compile emits for linear maps: the one way to oneDNN's float32 product on ordinary tensors.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
