"""AlterNet (Park and Kim, 2022; xxxnell/how-do-vits-work, models/alternet.py): a ResNet whose stages end in attention.

Every stage is blocks of convolution, the last ones alternating with blocks of attention within windows. All blocks are
pre-activated: norm and activation come first. Maps are channels-last, [B, h, w, C].
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError

from .block import add_branch
from .convolutional import LocalAttention, pointwise
from .norm import BatchNorm

WIDTHS = (64, 128, 256, 512)  # channels of the stages, times the expansion at their end
HEADS = (3, 6, 12, 24)
STRIDE = 32  # pixels on a side of a place of the last map


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


class AlterNet(nn.Module):
    """Image classifier; depth is one of DEPTHS. drop_path rises over all blocks and acts in those of attention."""

    def __init__(
        self,
        depth: str,
        image_size: int,
        classes: int,
        *,
        window: int = 7,
        head_width: int = 64,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % (STRIDE * window):
            raise ConfigError(
                "data.image_size",
                image_size,
                f"windows of {window} places tile no stage's map unless the side is a multiple of {STRIDE * window}",
                f"use e.g. {STRIDE * window}",
            )
        shape = DEPTHS[depth]
        count = sum(shape.blocks)
        rates = [drop_path * number / (count - 1) for number in range(count)]
        self.stem = nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False)
        self.blocks = nn.ModuleList()
        width = WIDTHS[0]
        for stage, channels in enumerate(WIDTHS):
            for number, attends in enumerate(pattern(shape.blocks[stage], shape.attention[stage])):
                stride = 2 if stage and number == 0 else 1
                if attends:
                    rate = rates[len(self.blocks)]
                    size = (HEADS[stage], head_width, window, shape.expansion, rate)
                    self.blocks.append(AttentionBlock(width, channels, *size))
                else:
                    self.blocks.append(ConvBlock(width, channels, stride, shape.expansion))
                width = channels * shape.expansion
        self.width = width
        self.norm = BatchNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> scores [B, classes]."""
        return self.head(self.features(image).mean((1, 2)))

    def features(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> the last map, [B, S/32, S/32, C]."""
        x = F.max_pool2d(self.stem(image), 3, 2, 1).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return torch.relu(self.norm(x))


def pattern(blocks: int, attention: int) -> list[bool]:
    """Which of a stage's blocks are attention: the last ones, alternating with convolution."""
    if 2 * attention > blocks:
        raise ValueError(f"{attention} of {blocks} blocks cannot be attention: each follows one of convolution")
    return [False] * (blocks - 2 * attention) + [False, True] * attention
