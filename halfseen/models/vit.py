"""The trunk: one Vision Transformer whose parts are independent choices.

Shapes: B batch, N tokens, D width, H heads, L depth, P patch side. Parameter names follow timm's
VisionTransformer where an equal part exists.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError, Model
from halfseen.data.masks import split

from .block import Block, ParallelBlock
from .positions import sincos
from .sizes import Size, resolve
from .stem import stem_of


class ViT(nn.Module):
    """Stem, positions, blocks, final norm; tokens out.

    Token order: class token (if any), registers, patches row by row. Registers have no position. With
    position=sincos, pos_embed is a parameter that does not train.
    """

    def __init__(self, cfg: Model, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        size = resolve(cfg)
        refuse(cfg, size)
        self.cfg, self.size = cfg, size
        self.width, self.depth, self.patch = size.width, size.depth, size.patch
        self.grid = grid_of(image_size, size.patch)
        self.tokens = self.grid[0] * self.grid[1]
        self.prefix = int(cfg.class_token) + cfg.registers
        self.position_rows = int(cfg.class_token and cfg.position_on_class)  # rows of pos_embed before the patches
        self.repetitions = cfg.share
        self.patch_embed = stem_of(cfg.stem, size.width, size.patch, cfg.stem_norm, cfg.norm_eps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width)) if cfg.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, cfg.registers, size.width)) if cfg.registers else None
        self.pos_embed = position_table(cfg.position, size.width, self.grid, self.position_rows)
        self.blocks = nn.ModuleList(blocks_of(cfg, size))
        self.norm = nn.LayerNorm(size.width, eps=cfg.norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """MAE's initial weights: Linear Xavier (qkv as one), tokens and learned positions N(0, 0.02)."""
        initialise(self.blocks)
        self.patch_embed.initialise()
        for token in (
            self.cls_token,
            self.reg_token,
            self.pos_embed if self.cfg.position == "learned" else None,
        ):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        visible: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the final norm: all, [B, prefix + N, D], or visible ones, [B, prefix + visible, D].

        image float [B, 3, h*P, w*P]. mask bool [B, N], True = hidden, with ``visible`` False entries in every
        row: the stem runs on those patches only, in ascending token order. index int64 [B, visible] says the
        same as token numbers, for callers that have them.
        """
        if mask is not None and index is None:
            if visible is None:
                raise ValueError("a mask needs `visible`, the number of tokens it leaves in every sample")
            index = split(mask, visible)[0]
        x = self.embed(image, index)
        for block in self.blocks:
            for repetition in range(self.repetitions):
                x = block(x, repetition)
        return self.norm(x)

    def embed(self, image: Tensor, index: Tensor | None = None) -> Tensor:
        """What enters the first block: stem, positions, prefix tokens. index as in forward."""
        self._check_image(image)
        x = self.patch_embed(image, index)
        table = self.pos_embed
        if table is not None:
            patches = table[:, self.position_rows :]
            x = x + (patches if index is None else F.embedding(index, patches[0]))
        prefix = []
        if self.cls_token is not None:
            position = 0.0 if table is None or not self.position_rows else table[:, :1]
            prefix.append(self.cls_token + position)
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        if prefix:
            x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        return x

    def _check_image(self, image: Tensor) -> None:
        expected = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        if tuple(image.shape[1:]) != (3, *expected):
            raise ValueError(
                f"images of {tuple(image.shape[1:])} for a trunk of {(3, *expected)}: build the ViT for that "
                "size and move its position table there (models.positions.resize)"
            )

    def check_visible_only(self) -> None:
        """Raise ConfigError unless each token depends on its own patch alone, also while training."""
        if self.cfg.stem == "conv":
            raise ConfigError(
                "model.stem",
                "conv",
                "overlapping convolutions see hidden pixels, so an encoder of visible patches cannot",
                "use model.stem=hmlp (patch by patch, LayerNorm) or model.stem=patch",
            )
        if self.cfg.stem == "hmlp" and self.cfg.stem_norm == "batch":
            raise ConfigError(
                "model.stem_norm",
                "batch",
                "in training BatchNorm mixes patches through its statistics, so a token would depend on "
                "others and the statistics on the mask",
                "use model.stem_norm=layer",
            )

    def flops(self, tokens_kept: int | None = None) -> float:
        """Forward matmul FLOPs per image (a multiply-add is 2) with so many patches kept; None: all."""
        patches = self.tokens if tokens_kept is None else tokens_kept
        per_block = block_flops(patches + self.prefix, self.width, self.size.hidden)
        return patches * self.patch_embed.flops() + self.depth * self.cfg.parallel * per_block


def refuse(cfg: Model, size: Size) -> None:
    """Raise ConfigError for parts that cannot stand together."""
    if cfg.share > 1 and cfg.parallel > 1:
        raise ConfigError(
            "model.share",
            cfg.share,
            f"weight sharing is defined for sequential blocks, not for model.parallel={cfg.parallel}",
            "use model.share=1 or model.parallel=1",
        )
    if cfg.position == "sincos" and size.width % 4:
        raise ConfigError("model.position", "sincos", f"needs a width divisible by 4, not {size.width}", "learned")


def grid_of(image_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Patches down and across an image. Raises ConfigError unless the patch divides it."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch or width % patch:
        near = max(patch, round(height / patch) * patch)
        raise ConfigError(
            "data.image_size",
            image_size,
            f"does not divide by the patch of {patch} pixels",
            f"use e.g. {near}",
        )
    return height // patch, width // patch


def position_table(kind: str, width: int, grid: tuple[int, int], prefix_rows: int) -> nn.Parameter | None:
    """The absolute position table [1, prefix_rows + h*w, D] of a kind, or None."""
    if kind == "none":
        return None
    if kind == "sincos":
        return nn.Parameter(sincos(width, grid, prefix_rows), requires_grad=False)
    return nn.Parameter(torch.zeros(1, prefix_rows + grid[0] * grid[1], width))


def blocks_of(cfg: Model, size: Size) -> list[nn.Module]:
    """The trunk's modules in order: depth blocks, or depth/share of them with share repetitions each."""
    steps = max(size.depth - 1, 1)
    ramp = [step / steps if cfg.drop_path_shape == "linear" else 1.0 for step in range(size.depth)]
    rates = [cfg.drop_path * share for share in ramp]
    shape = (size.width, size.heads, size.hidden)
    if cfg.parallel > 1:
        return [
            ParallelBlock(
                *shape,
                cfg.parallel,
                rate=rate,
                layer_scale=cfg.layer_scale,
                qkv_bias=cfg.qkv_bias,
                eps=cfg.norm_eps,
            )
            for rate in rates
        ]
    return [
        Block(
            *shape,
            rates=tuple(rates[first : first + cfg.share]),
            layer_scale=cfg.layer_scale,
            qkv_bias=cfg.qkv_bias,
            eps=cfg.norm_eps,
        )
        for first in range(0, size.depth, cfg.share)
    ]


def initialise(module: nn.Module) -> None:
    """Every Linear Xavier-uniform with zero bias, every LayerNorm one and zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def block_flops(tokens: int, width: int, hidden: int, asked: int | None = None) -> float:
    """Forward matmul FLOPs of one block; ``asked``: only so many tokens query and leave it."""
    asked = tokens if asked is None else asked
    keys_values = 2 * tokens * width * width
    rest = asked * (2 * width * width + 2 * width * hidden + 2 * tokens * width)
    return 2.0 * (keys_values + rest)
