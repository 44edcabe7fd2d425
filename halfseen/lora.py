"""LoRA: a frozen linear map and a trained one of low rank beside it (Hu et al., 2021, equation 3)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.models.attention import Attention
from halfseen.models.linear import Linear

DOWN, UP = "lora_down", "lora_up"


class Adapted(Linear):
    """x W^T + b + scale * (x A^T) B^T: W and b keep their names, A is ``lora_down`` [r, in], B ``lora_up`` [out, r].

    B starts at zero, so that a new one changes nothing. The scale is alpha / r.
    """

    def __init__(self, inside: int, outside: int, bias: bool, rank: int, alpha: float) -> None:
        super().__init__(inside, outside, bias)
        self.scale = alpha / rank
        self.lora_down = nn.Parameter(torch.empty(rank, inside))
        self.lora_up = nn.Parameter(torch.zeros(outside, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up) * self.scale

    def added(self) -> tuple[nn.Parameter, nn.Parameter]:
        """What trains."""
        return self.lora_down, self.lora_up


def insert(trunk: nn.Module, rank: int, alpha: float) -> None:
    """Put low-rank maps beside the linear maps of every attention (qkv and the output), in place.

    Call it before weights are loaded: names and values of what was there stay.
    """
    for attention in [module for module in trunk.modules() if isinstance(module, Attention)]:
        for name in ("qkv", "proj"):
            plain = getattr(attention, name)
            adapted = Adapted(plain.in_features, plain.out_features, plain.bias is not None, rank, alpha)
            adapted.weight, adapted.bias = plain.weight, plain.bias
            setattr(attention, name, adapted)


def merge(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the same student without low-rank maps, which have been added to what they stand beside.

    scale: alpha / rank. Computed in float64 and rounded once.
    """
    merged = {name: value for name, value in weights.items() if name.rpartition(".")[2] not in (DOWN, UP)}
    for prefix in prefixes(weights):
        down, up = (weights[f"{prefix}.{name}"].double() for name in (DOWN, UP))
        name = f"{prefix}.weight"
        merged[name] = (weights[name].double() + scale * (up @ down)).to(weights[name].dtype)
    return merged


def prefixes(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """The modules that have low-rank maps."""
    for name in weights:
        module, _, own = name.rpartition(".")
        if own == DOWN:
            yield module
