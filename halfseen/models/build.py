"""From a config to the blocks of a trunk."""

from collections.abc import Callable
from typing import Any

from torch import nn

from halfseen.config import Model

from .attention import Attention
from .block import Block, ParallelBlock
from .convolutional import Attention2d, ConvAttention2d, OnGrid
from .general import GeneralAttention, Parts
from .irpe import Encoding
from .legality import OVER_A_MAP
from .peg import PEG
from .powernorm import PowerNorm
from .sizes import Size, groups_of
from .swiglu import SwiGLU


def attention_of(
    cfg: Model, size: Size, grid: tuple[int, int], prefix: int, block: int, repetitions: int = 1
) -> Callable[[], nn.Module]:
    """What makes the attention of one block, or of one branch of a parallel block.

    grid: patches down and across; prefix: tokens before them. block: its number, of a shared one that of its first
    repetition; repetitions: blocks that share it.
    """
    chosen = block in (cfg.attention_blocks or range(size.depth))  # its attention is cfg.attention; else softmax
    if chosen and cfg.attention in OVER_A_MAP:
        return lambda: OnGrid(map_attention_of(cfg, size), grid)
    irpe = None
    if cfg.irpe != "none":
        tables = 1 if cfg.irpe_shared else size.heads
        head_width = size.width // size.heads
        irpe = Encoding(cfg.irpe, cfg.irpe_mode, cfg.irpe_ratio, tables, head_width, grid, prefix)
    parts = Parts(
        key_bias=cfg.key_bias,
        relative=(grid, prefix) if cfg.relative == "block" else None,
        irpe=irpe,
        irpe_on=cfg.irpe_on if irpe else "",
        mixing=None if cfg.head_mixing == "none" else cfg.head_mixing == "affine",
        reattention=chosen and cfg.attention == "reattention",
        repetitions=repetitions,
    )
    if parts == Parts(repetitions=repetitions) and cfg.relative == "none" and not cfg.rope:
        return lambda: Attention(size.width, size.heads, cfg.qkv_bias, cfg.attention_dropout)
    return lambda: GeneralAttention(size.width, size.heads, cfg.qkv_bias, parts, cfg.attention_dropout)


def map_attention_of(cfg: Model, size: Size) -> Attention2d:
    """The attention over maps that a config names."""
    shape = (size.width, size.heads, cfg.head_width or size.width // size.heads)
    if cfg.attention == "strided":
        return Attention2d(*shape, stride=cfg.attention_stride)
    options = {"kernel": cfg.attention_kernel, "dilation": cfg.attention_dilation}
    return ConvAttention2d(*shape, **options, padding=cfg.attention_padding)


def norm_of(cfg: Model, size: Size) -> nn.Module:
    """A norm over channels, as blocks have them."""
    return PowerNorm(size.width) if cfg.norm == "power" else nn.LayerNorm(size.width, eps=cfg.norm_eps)


def blocks_of(cfg: Model, size: Size, grid: tuple[int, int], prefix: int) -> list[nn.Module]:
    """The trunk's modules in order: one for each block, or for each group of blocks that share weights."""
    steps = max(size.depth - 1, 1)
    ramp = [step / steps if cfg.drop_path_shape == "linear" else 1.0 for step in range(size.depth)]
    rates = [cfg.drop_path * share for share in ramp]
    shape = (size.width, size.heads, size.hidden)
    parts: dict[str, Any] = {
        "layer_scale": cfg.layer_scale,
        "mlp": (lambda: SwiGLU(size.width, size.hidden)) if cfg.mlp == "swiglu" else None,
        "norm": lambda: norm_of(cfg, size),
    }
    blocks: list[nn.Module] = []
    first = 0
    for count in groups_of(cfg, size.depth):
        own = parts | {
            "attention": attention_of(cfg, size, grid, prefix, first, count),
            "peg": PEG(size.width, grid, prefix) if first < cfg.peg else None,
        }
        if cfg.parallel > 1:
            blocks.append(ParallelBlock(*shape, cfg.parallel, rate=rates[first], **own))
        else:
            shared = tuple(rates[first : first + count])
            blocks.append(Block(*shape, rates=shared, norm_place=cfg.norm_place, **own))
        first += count
    return blocks
