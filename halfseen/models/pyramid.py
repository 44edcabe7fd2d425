"""The pyramid of PVT (Wang et al., 2021; whai362/PVT, v1) and of CPVT-v2 (Chu et al., 2021; Meituan-AutoML/Twins).

Stages of ever coarser grids; attention looks at a summary of its grid. PVT v1 learns a position for each place of each
stage, and has a class token in the last one; CPVT-v2 has a PEG behind the first block of each stage and no class token.
Shapes: B batch, h x w places of a stage, C its channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError, between, positive

from .attention import Common, attend, by_head
from .block import Block
from .peg import PEG
from .staged import Hide, Staged

# Blocks of each stage; the rest is the same in all sizes.
DEPTHS = {"t": (2, 2, 2, 2), "s": (3, 4, 6, 3), "m": (3, 4, 18, 3), "l": (3, 8, 27, 3)}
DEFAULTS = {
    "widths": (64, 128, 320, 512),
    "heads": (1, 2, 5, 8),
    "mlp_ratios": (8, 8, 4, 4),
    "reductions": (8, 4, 2, 1),
}


@dataclass
class PyramidConfig:
    """PVT v1 (positions=learned) or CPVT-v2 (positions=peg); lists have one entry for each stage."""

    size: Literal["t", "s", "m", "l"] = "s"  # blocks of each stage, as PVT-Tiny to PVT-Large and Twins-PCPVT have them
    positions: Literal["learned", "peg"] = "learned"  # a table for each stage and a class token, or PEGs and neither
    depths: list[int] = field(default_factory=list)  # blocks of each stage; empty takes them from size
    widths: list[int] = field(default_factory=list)  # channels; empty: 64, 128, 320, 512
    heads: list[int] = field(default_factory=list)  # attention heads; empty: 1, 2, 5, 8
    mlp_ratios: list[float] = field(default_factory=list)  # hidden width of the MLP over channels; empty: 8, 8, 4, 4
    reductions: list[int] = field(default_factory=list)  # places on a side that attention sums up; empty: 8, 4, 2, 1
    patch: int = 4  # pixels on the side of a place of the first stage; each further stage halves the grid
    qkv_bias: bool = True  # bias on queries, keys and values
    drop_path: float = 0.0  # probability of dropping a sample's residual branch, a ramp from 0 over all blocks
    norm_eps: float = 1e-6  # LayerNorm epsilon of blocks and the last norm; the other norms have PyTorch's

    def check(self, key: str) -> None:
        """Ranges, and lists of one length."""
        positive(f"{key}.patch", self.patch)
        positive(f"{key}.norm_eps", self.norm_eps)
        between(f"{key}.drop_path", self.drop_path, 0.0, 0.99)
        depths = self.depths or DEPTHS[self.size]
        for name, default in DEFAULTS.items():
            values = getattr(self, name) or default
            if len(values) != len(depths):
                fix = f"give {len(depths)} numbers"
                raise ConfigError(
                    f"{key}.{name}", list(values), f"is not one number for each of {len(depths)} stages", fix
                )
        for stage in self.stages():
            if min(stage.depth, stage.heads, stage.reduction) < 1 or stage.width % stage.heads:
                fix = "use positive numbers, and widths that divide by the heads"
                raise ConfigError(f"{key}.heads", stage.heads, f"does not go with {stage}", fix)
        if self.positions == "learned" and stage.reduction > 1:
            reason = "the last stage has a class token, which is no part of a grid to sum up"
            raise ConfigError(f"{key}.reductions", stage.reduction, reason, "end it in 1, or use positions=peg")

    def stages(self) -> list["Stage"]:
        """The stages, with what the size leaves open filled in."""
        columns = [self.depths or DEPTHS[self.size], *(getattr(self, name) or DEFAULTS[name] for name in DEFAULTS)]
        return [
            Stage(depth, int(width), int(heads), ratio, int(by)) for depth, width, heads, ratio, by in zip(*columns)
        ]

    @property
    def stride(self) -> int:
        """Pixels on the side of a place of the last stage."""
        return self.patch << (len(self.stages()) - 1)


@dataclass(frozen=True)
class Stage:
    """One stage: blocks, channels C, heads, hidden width of the MLP over C, side of what attention sums up."""

    depth: int
    width: int
    heads: int
    mlp_ratio: float
    reduction: int


class ReducedAttention(nn.Module):
    """Keys and values come from a convolution that sums up squares of places (PVT's spatial reduction)."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int], reduction: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width) if reduction > 1 else None

    def forward(self, x: Tensor, last: int | None = None, common: Common | None = None, **_: object) -> Tensor:
        """x [B, h*w, C] -> [B, h*w, C]. Attention's other arguments do not apply: nothing is added to qkv."""
        if last is not None or common is not None:
            raise ValueError("only plain attention can compute some tokens alone")
        summary = x
        if self.sr is not None and self.norm is not None:
            summary = self.norm(self.sr(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2))
        q, k, v = (by_head(part, self.heads) for part in (self.q(x), *self.kv(summary).chunk(2, dim=-1)))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Merge(nn.Module):
    """Squares of places become one place, then a norm: the linear map at the beginning of a stage.

    rows: of the table of positions, which the stage adds; 0: it has none.
    """

    def __init__(self, channels: int, width: int, side: int, rows: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, side, side)
        self.norm = nn.LayerNorm(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, width)) if rows else None

    def forward(self, plane: Tensor) -> Tensor:
        """plane [B, C, h, w] -> tokens [B, h*w / side^2, C']."""
        return self.norm(self.proj(plane).flatten(2).transpose(1, 2))


class Pyramid(Staged):
    """Image to tokens of the last stage after the final norm, the class token first where there is one."""

    def __init__(self, cfg: PyramidConfig, image_size: int) -> None:
        super().__init__()
        stages = cfg.stages()
        self.cfg, self.image_size, self.patch, self.stride = cfg, image_size, cfg.patch, cfg.stride
        self.stem_width, self.width = stages[0].width, stages[-1].width
        if image_size % cfg.stride:
            near = max(1, round(image_size / cfg.stride)) * cfg.stride
            reason = f"does not divide by {cfg.stride} pixels, a place of the last stage"
            raise ConfigError("data.image_size", image_size, reason, f"use e.g. {near}")
        sides = [image_size // cfg.patch >> number for number in range(len(stages))]
        self.grids = [(side, side) for side in sides]
        self.grid, self.tokens = self.grids[-1], sides[-1] ** 2
        learned = cfg.positions == "learned"
        self.prefix = int(learned)
        self.depth = sum(stage.depth for stage in stages)
        rates = iter([cfg.drop_path * number / max(self.depth - 1, 1) for number in range(self.depth)])
        self.patch_embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        channels, factor = 3, cfg.patch
        for stage, side in zip(stages, sides):
            rows = side**2 + int(stage is stages[-1]) if learned else 0
            self.patch_embeds.append(Merge(channels, stage.width, factor, rows))
            made = [block_of(cfg, stage, (side, side), number, next(rates)) for number in range(stage.depth)]
            self.stages.append(nn.ModuleList(made))
            channels, factor = stage.width, 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width)) if learned else None
        self.norm = nn.LayerNorm(self.width, eps=cfg.norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """As published: Linear and positions N(0, 0.02) truncated, zero biases; PVT v1's convolutions as PyTorch's,
        CPVT-v2's by the square root of their fan-out."""
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed", "cls_token")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d) and self.cfg.positions == "peg":
                # Their fan-out counts a group's channels alone; PyTorch's counts all.
                spread = (2 / (module.weight[0, 0].numel() * module.out_channels / module.groups)) ** 0.5
                nn.init.normal_(module.weight, std=spread)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of all stages in order."""
        return nn.ModuleList(block for stage in self.stages for block in cast("Iterable[Block]", stage))

    def encode(self, image: Tensor, hide: Hide) -> Tensor:
        """See Staged."""
        plane = image
        for number, (grid, merge, blocks) in enumerate(zip(self.grids, self.patch_embeds, self.stages)):
            tokens = merge(plane)
            tokens = tokens if number else hide(tokens.unflatten(1, grid)).flatten(1, 2)
            if self.cls_token is not None and number == len(self.grids) - 1:
                tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            tokens = tokens if merge.pos_embed is None else tokens + merge.pos_embed
            for block in cast("Iterable[Block]", blocks):
                tokens = block(tokens)
            if number < len(self.grids) - 1:
                plane = tokens.transpose(1, 2).unflatten(2, grid)
        return self.norm(tokens)

    def layer_ids(self) -> dict[str, int]:
        """Layer of each parameter for layer-wise rates: embeddings 0, then the blocks; the norm is left to the head.

        What a later stage begins with is of the layer of the block before it, as in Swin.
        """
        depths = [stage.depth for stage in self.cfg.stages()]
        found = {"cls_token": sum(depths[:-1])} if self.cls_token is not None else {}
        for name, _ in self.named_parameters():
            kind, *inside = name.split(".")
            if kind == "patch_embeds":
                found[name] = sum(depths[: int(inside[0])])
            elif kind == "stages":
                found[name] = sum(depths[: int(inside[0])]) + int(inside[1]) + 1
        return found


def block_of(cfg: PyramidConfig, stage: Stage, grid: tuple[int, int], number: int, rate: float) -> Block:
    """Block ``number`` of a stage; a PEG stands behind the first."""
    return Block(
        stage.width,
        stage.heads,
        int(stage.width * stage.mlp_ratio),
        rates=(rate,),
        eps=cfg.norm_eps,
        attention=lambda: ReducedAttention(stage.width, stage.heads, grid, stage.reduction, cfg.qkv_bias),
        peg=PEG(stage.width, grid) if number == 0 and cfg.positions == "peg" else None,
    )
