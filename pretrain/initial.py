"""BEiT's random weights (microsoft/unilm, beit/modeling_pretrain.py)."""

import math

import torch
from torch import Tensor, nn

from halfseen.models import ViT


def initialise_trunk(trunk: ViT) -> None:
    """Linear maps, stem and tokens N(0, 0.02) cut off at one deviation, biases 0.

    Then what leaves each branch of block l, counted from 1, is divided by sqrt(2 l).
    """
    narrow(trunk)
    table = trunk.pos_embed if trunk.cfg.position == "learned" else None
    for tensor in (trunk.cls_token, trunk.dist_token, trunk.reg_token, table):
        if tensor is not None:
            narrow_(tensor)
    layer = 1
    for count, block in zip(trunk.groups, trunk.blocks):
        quieten(block, layer)
        layer += count


def narrow_(tensor: Tensor) -> None:
    """Fill a tensor with N(0, 0.02), cut off at one deviation."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def narrow(module: nn.Module) -> None:
    """Every linear map and convolution N(0, 0.02), cut off at one deviation, with zero bias."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            narrow_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@torch.no_grad()
def quieten(block: nn.Module, layer: int) -> None:
    """Divide what leaves the branches of block number ``layer``, counted from 1, by sqrt(2 layer)."""
    for name, parameter in block.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            parameter.div_(math.sqrt(2 * layer))
