"""CPVT's pyramid (Chu et al., 2021; Meituan-AutoML/Twins, gvt.py, CPVTV2): PVT with convolutional positions.

Stages of ever coarser grids; attention looks at a summary of its grid, and positions come from a PEG behind the first
block of each stage. There is no class token. Shapes: B batch, h x w places of a stage, C its channels.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Common, attend
from .block import Block
from .peg import PEG
from .places import Places


@dataclass(frozen=True)
class Stage:
    """One stage: channels C, blocks, heads, hidden width of the MLP over C, side of what attention sums up."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    reduction: int = 1


# CPVT-v2's published default.
STAGES = (Stage(64, 3, 1, 4, 8), Stage(128, 4, 2, 4, 4), Stage(256, 6, 4, 4, 2), Stage(512, 3, 8, 4, 1))


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

    def forward(
        self,
        x: Tensor,
        last: int | None = None,
        common: Common | None = None,
        *,
        places: Places | None = None,
        repetition: int = 0,
        qkv: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B, h*w, C] -> [B, h*w, C]; Attention's other arguments do not apply."""
        summary = x
        if self.sr is not None and self.norm is not None:
            summary = self.norm(self.sr(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2))
        q, k, v = (self._heads(part) for part in (self.q(x), *self.kv(summary).chunk(2, dim=-1)))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Merge(nn.Module):
    """Squares of places become one place, then a norm: the linear map at the beginning of a stage."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, side, side)
        self.norm = nn.LayerNorm(width)

    def forward(self, plane: Tensor) -> Tensor:
        """plane [B, C, h, w] -> tokens [B, h*w / side^2, C']."""
        return self.norm(self.proj(plane).flatten(2).transpose(1, 2))


class Pyramid(nn.Module):
    """Image to tokens of the last stage, [B, h*w, C], after the final norm. blocks holds all stages' in order."""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        stages: tuple[Stage, ...] = STAGES,
        patch: int = 4,
        *,
        qkv_bias: bool = False,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        height, length = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.stages, self.width, self.prefix = stages, stages[-1].width, 0
        self.patch = patch * 2 ** (len(stages) - 1)
        if height % self.patch or length % self.patch:
            raise ValueError(f"images of {height}x{length} do not divide by {self.patch}, a place of the last stage")
        depth = sum(stage.depth for stage in stages)
        rates = iter([drop_path * number / max(depth - 1, 1) for number in range(depth)])
        self.patch_embeds, self.blocks = nn.ModuleList(), nn.ModuleList()
        self.grids: list[tuple[int, int]] = []
        channels, side = 3, patch
        for stage in stages:
            height, length = height // side, length // side
            self.grids.append((height, length))
            self.patch_embeds.append(Merge(channels, stage.width, side))
            for number in range(stage.depth):
                self.blocks.append(block_of(stage, self.grids[-1], number, next(rates), qkv_bias, norm_eps))
            channels, side = stage.width, 2
        self.grid = self.grids[-1]
        self.tokens = height * length
        self.norm = nn.LayerNorm(self.width, eps=norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """As published: Linear N(0, 0.02) truncated, zero biases; convolutions by the square root of their fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> [B, h*w, C]."""
        plane, first = image, 0
        tokens = image
        for stage, grid, merge in zip(self.stages, self.grids, self.patch_embeds):
            tokens = merge(plane)
            for block in self.blocks[first : first + stage.depth]:
                tokens = block(tokens)
            plane, first = tokens.transpose(1, 2).unflatten(2, grid), first + stage.depth
        return self.norm(tokens)


def block_of(stage: Stage, grid: tuple[int, int], number: int, rate: float, qkv_bias: bool, norm_eps: float) -> Block:
    """Block ``number`` of a stage; the first has the PEG behind it."""
    return Block(
        stage.width,
        stage.heads,
        int(stage.width * stage.mlp_ratio),
        rates=(rate,),
        eps=norm_eps,
        attention=lambda: ReducedAttention(stage.width, stage.heads, grid, stage.reduction, qkv_bias),
        peg=PEG(stage.width, grid) if number == 0 else None,
    )
