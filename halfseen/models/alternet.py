"""AlterNet (Park and Kim, 2022; xxxnell/how-do-vits-work, models/alternet.py): a ResNet whose stages end in attention.

Every stage is blocks of convolution, the last ones alternating with blocks of attention within windows. All blocks are
pre-activated: norm and activation come first. Maps are channels-last, [B, h, w, C].
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError, between, positive

from .block import add_branch
from .convolutional import LocalAttention, pointwise
from .norm import BatchNorm
from .staged import Hide, Staged

HEADS = (3, 6, 12, 24)  # of each stage
PATCH, STRIDE = 4, 32  # pixels on a side of a place that leaves the stem, and of one of the last map


@dataclass
class AlterNetConfig:
    """AlterNet: a ResNet whose stages end in attention (how-do-vits-work)."""

    depth: Literal["18", "34", "50"] = "50"  # blocks of each stage as in the ResNet of that name
    width: int = 64  # channels that leave the stem; each stage has twice as many as the one before
    window: int = 7  # places on a side of the windows attention looks within; 32 times it divides the image
    head_width: int = 64  # channels of an attention head
    drop_path: float = 0.0  # probability of dropping a sample's attention; rises over all blocks

    def check(self, key: str) -> None:
        """Ranges."""
        for name in ("width", "window", "head_width"):
            positive(f"{key}.{name}", getattr(self, name))
        between(f"{key}.drop_path", self.drop_path, 0.0, 0.99)


@dataclass(frozen=True)
class Depth:
    """Blocks of each stage, and how many of them are attention."""

    blocks: tuple[int, int, int, int]
    attention: tuple[int, int, int, int]
    expansion: int = 1  # 4: bottlenecks


DEPTHS = {
    "18": Depth((2, 2, 2, 2), (0, 1, 1, 1)),
    "34": Depth((3, 4, 6, 4), (0, 1, 3, 2)),
    "50": Depth((3, 4, 6, 4), (0, 1, 3, 2), expansion=4),
}


def convolve(x: Tensor, convolution: nn.Module) -> Tensor:
    """A convolution, channels-last: [B, h, w, C] -> [B, h', w', C']."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def shortcut_of(width: int, out: int, stride: int) -> nn.Sequential:
    """What a block adds its branch to: a 1x1 convolution where the shape changes, else nothing."""
    same = stride == 1 and width == out
    return nn.Sequential(*([] if same else [nn.Conv2d(width, out, 1, stride, bias=False)]))


class ConvBlock(nn.Module):
    """Pre-activated residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1 (expansion 4)."""

    def __init__(self, width: int, channels: int, stride: int = 1, expansion: int = 1) -> None:
        super().__init__()
        out = channels * expansion
        self.shortcut = shortcut_of(width, out, stride)
        shapes = [(width, channels, 3, stride), (channels, out, 3, 1)]
        if expansion > 1:
            shapes = [(width, channels, 1, 1), (channels, channels, 3, stride), (channels, out, 1, 1)]
        self.norms = nn.ModuleList(BatchNorm(shape[0]) for shape in shapes)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False) for before, after, kernel, step in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h/stride, w/stride, C']."""
        skip = x
        for number, (norm, convolution) in enumerate(zip(self.norms, self.convs)):
            x = F.relu(norm(x))
            if number == 0 and len(self.shortcut):
                skip = convolve(x, self.shortcut[0])
            x = convolve(x, convolution)
        return skip + x


class AttentionBlock(nn.Module):
    """Pre-activated residual block around attention within windows (AttentionBlockB; expansion 1: its basic form).

    Where the shortcut has weights it sees the normalised, activated input, else the raw one. There is no stride: a
    stage begins with a convolution. rate: drop path.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        heads: int,
        head_width: int = 64,
        window: int = 7,
        expansion: int = 4,
        rate: float = 0.0,
    ) -> None:
        super().__init__()
        out, inner = channels * expansion, width // expansion
        self.rate = rate
        self.shortcut = shortcut_of(width, out, 1)
        self.norm1 = BatchNorm(width)
        self.conv = nn.Conv2d(width, inner, 1, bias=False)
        self.norm2 = BatchNorm(inner)
        self.attn = LocalAttention(inner, heads, head_width, out, window)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C']."""
        active = F.gelu(self.norm1(x))
        skip = convolve(active, self.shortcut[0]) if len(self.shortcut) else x
        grid = x.shape[1:3]

        def branch(tokens: Tensor) -> Tensor:
            plane = self.norm2(pointwise(tokens.unflatten(1, grid), self.conv))
            return self.attn(plane)[0].flatten(1, 2)

        rate = self.rate if self.training else 0.0
        # Samples are dropped after the branch: its batch norm is to see them all.
        mixed = add_branch(skip.flatten(1, 2), active.flatten(1, 2), branch, rate, every=True)
        return mixed.unflatten(1, grid)


class PostAttentionBlock(nn.Module):
    """The same with norms behind what they norm (AttentionBlockA; expansion 1: its basic form), in no AlterNet here."""

    def __init__(
        self, width: int, channels: int, heads: int, head_width: int = 64, window: int = 7, expansion: int = 4
    ) -> None:
        super().__init__()
        out, inner = channels * expansion, width // expansion
        self.shortcut = shortcut_of(width, out, 1)
        if len(self.shortcut):
            self.shortcut.append(BatchNorm(out))
        self.conv = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), BatchNorm(inner))
        self.attn = LocalAttention(inner, heads, head_width, out, window)
        self.norm = BatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C']."""
        skip = self.shortcut[1](convolve(x, self.shortcut[0])) if len(self.shortcut) else x
        inner = F.gelu(self.conv[1](convolve(x, self.conv[0])))
        return skip + self.norm(self.attn(inner)[0])


class AlterNet(Staged):
    """Images to the last map, normalised and activated; drop path acts in the blocks of attention."""

    patch, stride = PATCH, STRIDE

    def __init__(self, cfg: AlterNetConfig, image_size: int) -> None:
        super().__init__()
        unit = STRIDE * cfg.window
        if image_size % unit:
            reason = f"windows of {cfg.window} places tile every stage's map if the side is a multiple of {unit}"
            raise ConfigError("data.image_size", image_size, reason, f"use e.g. {unit}, or another alternet.window")
        self.cfg, self.image_size, self.stem_width = cfg, image_size, cfg.width
        self.grid = (image_size // STRIDE, image_size // STRIDE)
        self.tokens = self.grid[0] * self.grid[1]
        shape = DEPTHS[cfg.depth]
        self.depth = sum(shape.blocks)
        rates = [cfg.drop_path * number / (self.depth - 1) for number in range(self.depth)]
        self.stem = nn.Conv2d(3, cfg.width, 7, 2, 3, bias=False)
        self.blocks = nn.ModuleList()
        width = cfg.width
        for stage, count in enumerate(shape.blocks):
            channels = cfg.width << stage
            for number, attends in enumerate(pattern(count, shape.attention[stage])):
                if attends:
                    size = (HEADS[stage], cfg.head_width, cfg.window, shape.expansion, rates[len(self.blocks)])
                    self.blocks.append(AttentionBlock(width, channels, *size))
                else:
                    stride = 2 if stage and number == 0 else 1
                    self.blocks.append(ConvBlock(width, channels, stride, shape.expansion))
                width = channels * shape.expansion
        self.width = width
        self.norm = BatchNorm(width)

    def encode(self, image: Tensor, hide: Hide) -> Tensor:
        """See Staged."""
        x = hide(F.max_pool2d(self.stem(image), 3, 2, 1).permute(0, 2, 3, 1))
        for block in self.blocks:
            x = block(x)
        return torch.relu(self.norm(x)).flatten(1, 2)

    def layer_ids(self) -> dict[str, int]:
        """Layer of each parameter for layer-wise rates: the stem 0, block i is i + 1, the norm with the head."""
        inside = {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters() if name.startswith("blocks")}
        return {"stem.weight": 0} | inside


def pattern(blocks: int, attention: int) -> list[bool]:
    """Which of a stage's blocks are attention: the last ones, alternating with convolution."""
    if 2 * attention > blocks:
        raise ValueError(f"{attention} of {blocks} blocks cannot be attention: each follows one of convolution")
    return [False] * (blocks - 2 * attention) + [False, True] * attention
