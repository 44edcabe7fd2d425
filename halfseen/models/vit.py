"""The trunk: one Vision Transformer whose parts are independent choices.

Shapes: B batch, N tokens, D width, H heads, L depth, P patch side. Parameter names follow timm's
VisionTransformer where an equal part exists.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError, Model
from halfseen.data.masks import split

from .build import blocks_of, norm_of
from .legality import OVER_A_MAP, check, check_visible_only
from .places import Places
from .positions import sincos
from .relative import RelativeBias
from .rotary import angles
from .sizes import groups_of, resolve
from .stem import stem_of


@dataclass(frozen=True)
class Trace:
    """What a trunk computed on the way. Blocks are counted from 0 over the depth, each repetition of a shared one."""

    tokens: Tensor  # after the final norm, [B, prefix + N, D]
    layers: dict[int, Tensor] = field(default_factory=dict)  # block -> the tokens it left, not normalised
    qkv: dict[int, Tensor] = field(default_factory=dict)  # block -> queries, keys and values, [B, prefix + N, 3D]


class ViT(nn.Module):
    """Stem, positions, blocks, final norm; tokens out.

    Token order: class token, distillation token, registers (what there is of them), patches row by row. Registers have
    no position. With position=sincos, pos_embed is a parameter that does not train.
    """

    rotation: Tensor | None

    def __init__(self, cfg: Model, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        size = resolve(cfg)
        check(cfg)
        self.cfg, self.size = cfg, size
        self.width, self.depth, self.patch = size.width, size.depth, size.patch
        self.groups = groups_of(cfg, size.depth)  # blocks that each module of self.blocks stands for
        self.grid = grid_of(image_size, size.patch)
        self.tokens = self.grid[0] * self.grid[1]
        named = int(cfg.class_token) + int(cfg.distillation_token)
        self.prefix = named + cfg.registers
        self.position_rows = named if cfg.position_on_class else 0  # rows of pos_embed before the patches
        self.patch_embed = stem_of(cfg.stem, size.width, size.patch, cfg.stem_norm, cfg.norm_eps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width)) if cfg.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, size.width)) if cfg.distillation_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, cfg.registers, size.width)) if cfg.registers else None
        self.pos_embed = position_table(cfg.position, size.width, self.grid, self.position_rows)
        self.rel_pos_bias = RelativeBias(size.heads, self.grid, self.prefix) if cfg.relative == "shared" else None
        rotation = angles(size.width // size.heads, self.grid, self.prefix, cfg.rope_base) if cfg.rope else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.blocks = nn.ModuleList(blocks_of(cfg, size, self.grid, self.prefix))
        self.norm = nn.Identity() if cfg.norm_place == "post" else norm_of(cfg, size)
        self.initialise()

    def initialise(self) -> None:
        """MAE's initial weights: Linear Xavier (qkv as one), tokens and learned positions N(0, 0.02)."""
        initialise(self.blocks)
        self.patch_embed.initialise()
        for token in (
            self.cls_token,
            self.dist_token,
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
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the final norm: all, [B, prefix + N, D], or visible ones, [B, prefix + visible, D].

        image float [B, 3, h*P, w*P]. mask bool [B, N], True = hidden, with ``visible`` False entries in every
        row: the stem runs on those patches only, in ascending token order. index int64 [B, visible] says the
        same as token numbers, for callers that have them. With mask_token [1, 1, D] all tokens are kept, and hidden
        ones are replaced by it between stem and positions (BEiT, SimMIM, MaskFeat).
        """
        if mask is not None and index is None and mask_token is None:
            if visible is None:
                raise ValueError("a mask needs `visible`, the number of tokens it leaves in every sample")
            index = split(mask, visible)[0]
        x = self.embed(image, index, mask, mask_token)
        places = self.places(index)
        for block in self.blocks:
            x = block(x, places=places)
        return self.norm(x)

    def trace(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        *,
        index: Tensor | None = None,
        layers: Collection[int] = (),
        qkv: Collection[int] = (),
    ) -> Trace:
        """The tokens, and what chosen blocks computed: their results (layers), their queries, keys and values (qkv).

        The arguments are those of forward. Nothing is kept anywhere: what is asked for is returned.
        """
        unknown = sorted({*layers, *qkv} - set(range(self.depth)))
        if unknown:
            raise ValueError(f"there are no blocks {unknown}, only 0 to {self.depth - 1}")
        if qkv and (self.cfg.parallel > 1 or self.cfg.attention in OVER_A_MAP):
            raise ValueError("queries, keys and values of one attention over tokens are asked for, and there is none")
        x = self.embed(image, index, mask, mask_token)
        places = self.places(index)
        found = Trace(x)
        first = 0
        for count, block in zip(self.groups, self.blocks):
            x, states, projected = block(x, places=places, trace=True)
            found.layers.update({first + step: state for step, state in enumerate(states) if first + step in layers})
            found.qkv.update({first + step: value for step, value in enumerate(projected) if first + step in qkv})
            first += count
        return Trace(self.norm(x), found.layers, found.qkv)

    def places(self, index: Tensor | None = None) -> Places | None:
        """What every call of a block must be given about these tokens; None: nothing. index as in forward."""
        if self.cfg.relative == "none" and self.cfg.irpe == "none" and self.rotation is None:
            return None
        present = None
        if index is not None:
            prefix = torch.arange(self.prefix, device=index.device).expand(len(index), -1)
            present = torch.cat([prefix, index + self.prefix], dim=1)
        rotation = self.rotation
        if rotation is not None:
            rotation = rotation[None, None] if present is None else F.embedding(present, rotation)[:, None]
        return Places(present, None if self.rel_pos_bias is None else self.rel_pos_bias(present), rotation)

    def embed(
        self,
        image: Tensor,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """What enters the first block, [B, prefix + N or visible, D]: stem, mask tokens, positions, prefix tokens.

        Arguments as in forward.
        """
        self._check_image(image)
        x = self.patch_embed(image, index)
        if mask_token is not None:
            if mask is None or index is not None:
                raise ValueError("a mask token goes where a mask says, among all tokens: give mask and no index")
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        table = self.pos_embed
        if table is not None:
            patches = table[:, self.position_rows :]
            x = x + (patches if index is None else F.embedding(index, patches[0]))
        prefix = []
        named = [token for token in (self.cls_token, self.dist_token) if token is not None]
        for row, token in enumerate(named):
            placed = table is not None and self.position_rows
            prefix.append(token + table[:, row : row + 1] if table is not None and placed else token)
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        if prefix:
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return x

    def _check_image(self, image: Tensor) -> None:
        expected = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        if tuple(image.shape[1:]) != (3, *expected):
            raise ValueError(
                f"images of {tuple(image.shape[1:])} for a trunk of {(3, *expected)}: build the ViT for that "
                "size and move its position table there (models.positions.resize)"
            )

    def check_visible_only(self) -> None:
        """Raise ConfigError unless an encoder of visible patches alone can use this trunk (see legality)."""
        check_visible_only(self.cfg)

    def flops(self, tokens_kept: int | None = None) -> float:
        """Forward matmul FLOPs per image (a multiply-add is 2) with so many patches kept; None: all.

        iRPE, head mixing, PEGs and a head width of its own are left out: a few per cent.
        """
        cfg, patches = self.cfg, self.tokens if tokens_kept is None else tokens_kept
        tokens = patches + self.prefix
        per_block = block_flops(tokens, self.width, self.size.hidden)
        total = patches * self.patch_embed.flops() + self.depth * cfg.parallel * per_block
        if cfg.attention in OVER_A_MAP:
            # There a token looks at fewer than all.
            seen = cfg.attention_kernel**2 if cfg.attention == "convolutional" else tokens / cfg.attention_stride**2
            total -= len(cfg.attention_blocks or range(self.depth)) * 4.0 * tokens * self.width * (tokens - seen)
        return total


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
