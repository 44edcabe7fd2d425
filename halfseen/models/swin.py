"""Swin Transformer whose consecutive blocks may share their weights (Liu et al., 2021; MiniViT, 2022).

Shapes: B batch, h x w places of a stage, W windows of M x M places, C channels. Parameter names follow timm's Swin
where an equal part exists. What a repetition of a shared block has for itself is a list with one entry each.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError, between, positive

from .attention import attend
from .block import add_branch, one_of
from .feed import Mlp
from .general import HeadMixing
from .relative import bias_of, relative_index, relative_rows
from .staged import hide_places
from .vit import Trace, block_flops

# Channels of the first stage, blocks and heads of each stage.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "l": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
CONV_SIDE = 7  # of MiniViT's depth-wise convolution, whatever the window is
BLOCKED = -100.0  # added to the score of two places that the cyclic shift has put into one window


@dataclass
class SwinConfig:
    """The hierarchical trunk. Defaults are Swin's; share, mix_heads and local_conv make it Mini-Swin."""

    size: Literal["t", "s", "b", "l"] = "t"  # width, depths and heads; see SIZES in halfseen/models/swin.py
    width: int | None = None  # channels of the first stage; None takes it from size
    depths: list[int] = field(default_factory=list)  # blocks of each stage; empty takes them from size
    heads: list[int] = field(default_factory=list)  # attention heads of each stage; empty takes them from size
    patch: int = 4  # pixels on a patch's side
    window: int = 7  # places on a window's side; a stage that is no larger is one window
    mlp_ratio: float = 4.0  # hidden width of the MLP over the stage's width
    qkv_bias: bool = True  # bias on q, k and v, and on the depth-wise convolution
    drop_path: float = 0.0  # probability of dropping a sample's residual branch, a ramp from 0 over all blocks
    norm_eps: float = 1e-5  # LayerNorm epsilon
    share: list[int] = field(default_factory=list)  # of each stage: consecutive blocks that share weights; empty: none
    own_norms: bool = True  # each repetition of a shared block has norms of its own
    mix_heads: bool = False  # linear maps over the heads before and after the softmax, each repetition's own
    local_conv: bool = False  # a depth-wise 7x7 convolution before the MLP, each repetition's own
    mask_unshifted: bool = False  # as released: the mask of shifted windows in unshifted blocks too
    conv_on_norm: bool = False  # as released: the normalised stream replaces the stream at the convolution
    patch_norm: bool = True  # a norm after the stem
    absolute: bool = False  # a learned position for each patch of the stem, beside the windows' relative ones

    def check(self, key: str) -> None:
        """Ranges, and lists of one length."""
        for name in ("patch", "window", "mlp_ratio", "norm_eps"):
            positive(f"{key}.{name}", getattr(self, name))
        between(f"{key}.drop_path", self.drop_path, 0.0, 0.99)
        width, depths, heads, share = self.resolved()
        for name, values in (("heads", heads), ("share", share)):
            if len(values) != len(depths):
                reason = f"is not one number for each of {len(depths)} stages"
                raise ConfigError(f"{key}.{name}", values, reason, f"give {len(depths)} numbers")
        for stage, (depth, head, times) in enumerate(zip(depths, heads, share)):
            if times < 1 or depth % times:
                reason = f"{times} does not divide the {depth} blocks of stage {stage}"
                raise ConfigError(f"{key}.share", share, reason, "use divisors of the depths, e.g. 2 for each stage")
            if head < 1 or (width << stage) % head:
                reason = f"{head} does not divide the {width << stage} channels of stage {stage}"
                raise ConfigError(f"{key}.heads", heads, reason, "use one head per 32 channels")

    def resolved(self) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Width, depths, heads and share with what the size leaves open filled in."""
        width, depths, heads = SIZES[self.size]
        depths = tuple(self.depths) or depths
        return self.width or width, depths, tuple(self.heads) or heads, tuple(self.share) or (1,) * len(depths)

    @property
    def stride(self) -> int:
        """Pixels on the side of a place of the last stage."""
        return self.patch << (len(self.resolved()[1]) - 1)


class Swin(nn.Module):
    """Patches, stages of windowed blocks with a merging of 2 x 2 places between them, final norm; tokens out."""

    prefix = 0  # tokens before the places
    # What only ViTs have.
    dist_token = None
    pos_embed = None

    def __init__(self, cfg: SwinConfig, image_size: int) -> None:
        super().__init__()
        width, depths, heads, share = cfg.resolved()
        self.cfg, self.depth, self.patch = cfg, sum(depths), cfg.patch
        self.stem_width, self.width = width, width << (len(depths) - 1)
        self.stride = cfg.stride
        sides = stage_sides(cfg, image_size, len(depths))
        self.grid = (sides[-1], sides[-1])
        self.tokens = sides[-1] ** 2
        self.patch_embed = Patches(width, cfg)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, sides[0] ** 2, width)) if cfg.absolute else None
        ramp = [cfg.drop_path * number / max(self.depth - 1, 1) for number in range(self.depth)]
        self.layers = nn.ModuleList()
        for stage, (depth, head, times, side) in enumerate(zip(depths, heads, share, sides)):
            rates, ramp = ramp[:depth], ramp[depth:]
            self.layers.append(Stage(width << stage, head, side, rates, times, cfg, first=stage == 0))
        self.norm = nn.LayerNorm(self.width, eps=cfg.norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Swin's initial weights: Linear and tables N(0, 0.02) truncated, convolutions PyTorch's default."""
        for name, parameter in self.named_parameters():
            if name.endswith(("relative_position_bias_table", "absolute_pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of all stages in order, each shared one once."""
        return nn.ModuleList(block for stage in self.stages for block in stage.blocks)

    @property
    def stages(self) -> list["Stage"]:
        """The stages in order."""
        return cast("list[Stage]", list(self.layers))

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """image float [B, 3, S, S] -> tokens of the last stage after the final norm, [B, h*w, C].

        mask bool [B, K*K], True = hidden, on any grid whose cells are whole patches of the stem: those are replaced by
        mask_token [1, 1, C'] (C' channels of the stem) between the stem and the first block (SimMIM).
        """
        return self.trace(image, mask, mask_token).tokens

    def embed(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """What enters the first stage, [B, h', w', C']. Arguments as in forward."""
        x = self.patch_embed(image)
        if mask is not None and mask_token is not None:
            x = hide_places(x, mask, mask_token)
        return x if self.absolute_pos_embed is None else x + self.absolute_pos_embed.view(1, *x.shape[1:])

    def trace(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        *,
        layers: Collection[int] = (),
        qkv: Collection[int] = (),
    ) -> Trace:
        """Tokens, and what chosen blocks computed; blocks are counted over all stages, repetitions included.

        layers: the tokens a block left, [B, h*w, C], before any merging. qkv: its queries, keys and values window by
        window, [B*W, M*M, 3C], the windows of one sample in a row.
        """
        unknown = sorted({*layers, *qkv} - set(range(self.depth)))
        if unknown:
            raise ValueError(f"no blocks {unknown} among 0..{self.depth - 1}")
        x, number = self.embed(image, mask, mask_token), 0
        states: dict[int, Tensor] = {}
        projected: dict[int, Tensor] = {}
        for stage in self.stages:
            x = stage.downsample(x)
            for block in cast("list[SwinBlock]", stage.blocks):
                wanted = range(number, number := number + len(block.rates))
                if not {*wanted} & {*layers, *qkv}:
                    x = block(x)
                    continue
                x, left, asked = block(x, trace=True)
                states |= {n: state.flatten(1, 2) for n, state in zip(wanted, left) if n in layers}
                projected |= {n: value for n, value in zip(wanted, asked) if n in qkv}
        return Trace(self.norm(x).flatten(1, 2), states, projected)

    def stage_of(self, block: int) -> int:
        """The stage of a block, counted as in trace; its blocks have width_of(block) channels."""
        _, depths, _, _ = self.cfg.resolved()
        return [stage for stage, depth in enumerate(depths) for _ in range(depth)][block]

    def width_of(self, block: int) -> int:
        """Channels of a block."""
        return self.stages[self.stage_of(block)].width

    def layer_ids(self) -> dict[str, int]:
        """Layer of each parameter for layer-wise rates (microsoft/SimMIM, optimizer.py): embeddings 0, then the blocks.

        A merging is of the layer of the block before it, a shared block counts once, the norm is left to the head.
        """
        counts, found = [len(stage.blocks) for stage in self.stages], {}
        for name, _ in self.named_parameters():
            if inside := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
                before = sum(counts[: int(inside[1])])
                found[name] = before + (int(inside[2]) + 1 if inside[2] else 0)
            elif name.startswith(("patch_embed.", "absolute_pos_embed")):
                found[name] = 0
        return found

    def flops(self) -> float:
        """Forward matmul FLOPs per image (a multiply-add is 2)."""
        return self.patch_embed.flops(self.stages[0].side) + sum(stage.flops() for stage in self.stages)


def stage_sides(cfg: SwinConfig, image_size: int, stages: int) -> list[int]:
    """Places on each stage's side. Raises ConfigError unless patches, merging and windows divide them."""
    unit = cfg.patch << (stages - 1)  # pixels of a place in the last stage
    sides = [image_size // cfg.patch >> stage for stage in range(stages)]
    if image_size % unit or any(side % min(cfg.window, side) for side in sides):
        near = max(1, round(image_size / (unit * cfg.window))) * unit * cfg.window
        raise ConfigError(
            "data.image_size",
            image_size,
            f"does not divide into {unit} px, or windows of {cfg.window} do not divide the stages' sides {sides}",
            f"use e.g. {near}, or another swin.window",
        )
    return sides


class Patches(nn.Module):
    """One linear map per patch, then a norm."""

    def __init__(self, width: int, cfg: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, cfg.patch, cfg.patch)
        self.norm = nn.LayerNorm(width, eps=cfg.norm_eps) if cfg.patch_norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, h, w, C]."""
        return self.norm(self.proj(image).permute(0, 2, 3, 1))

    def flops(self, side: int) -> float:
        """Forward matmul FLOPs of side x side patches."""
        return 2.0 * side**2 * self.proj.weight.numel()


class Merging(nn.Module):
    """2 x 2 places become one of twice the channels; the order is down, then right."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h/2, w/2, 2C]."""
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h/2, 2, w/2, 2, C]
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Stage(nn.Module):
    """Merging (except in the first stage), then blocks at one resolution."""

    def __init__(
        self, width: int, heads: int, side: int, rates: list[float], times: int, cfg: SwinConfig, first: bool
    ) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.downsample = nn.Identity() if first else Merging(width // 2, cfg.norm_eps)
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, side, tuple(rates[start : start + times]), start % 2, cfg)
            for start in range(0, len(rates), times)
        )

    def flops(self) -> float:
        """Forward matmul FLOPs of the stage."""
        total = 0.0 if isinstance(self.downsample, nn.Identity) else 2.0 * self.side**2 * 2 * self.width**2
        return total + sum(block.flops() * len(block.rates) for block in cast("list[SwinBlock]", self.blocks))


class SwinBlock(nn.Module):
    """x + windowed attention(norm(x)), then x + mlp(norm(x)); one module for several consecutive blocks.

    Repetitions shift their windows in turn. Shared: qkv, proj, MLP and the relative position table; each repetition's
    own: norms, maps over heads, depth-wise convolution with its norm, drop path.
    """

    mask: Tensor | None

    def __init__(
        self, width: int, heads: int, side: int, rates: tuple[float, ...], first_shifted: int, cfg: SwinConfig
    ) -> None:
        super().__init__()
        self.rates, self.first_shifted, self.side = list(rates), first_shifted, side  # a list: see Block
        self.window = min(cfg.window, side)
        self.shift = self.window // 2 if side > self.window else 0
        self.mask_unshifted, self.conv_on_norm = cfg.mask_unshifted, cfg.conv_on_norm

        def norm(own: bool) -> nn.Module:
            return each(len(rates) if own else 1, lambda: nn.LayerNorm(width, eps=cfg.norm_eps))

        self.norm1 = norm(cfg.own_norms)
        self.attn = WindowAttention(width, heads, self.window, len(rates), cfg)
        self.convolves = cfg.local_conv
        if cfg.local_conv:
            self.local_norm = norm(True)
            self.local_conv = each(len(rates), lambda: depthwise(width, cfg.qkv_bias))
        self.norm2 = norm(cfg.own_norms)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio))
        mask = shift_mask(side, self.window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, repetition: int | None = None, trace: bool = False) -> Tensor | tuple[Tensor, ...]:
        """x [B, h, w, C] -> [B, h, w, C]. repetition: one of them; None: all in turn.

        trace: also return lists of each repetition's result and of its queries, keys and values [B*W, M*M, 3C].
        """
        states: list[Tensor] = []
        qkv: list[Tensor] | None = [] if trace else None
        for number in range(len(self.rates)) if repetition is None else (repetition,):
            x = self._once(x, number, qkv)
            states += [] if qkv is None else [x]
        return x if qkv is None else (x, states, qkv)  # type: ignore[return-value]

    def _once(self, x: Tensor, repetition: int, qkv: list[Tensor] | None) -> Tensor:
        norm1, norm2 = (one_of(norm, repetition) for norm in (self.norm1, self.norm2))
        rate = self.rates[repetition] if self.training else 0.0
        shift = self.shift if (repetition + self.first_shifted) % 2 else 0
        mask = self.mask if shift or self.mask_unshifted else None
        shape = x.shape

        def attention(part: Tensor) -> Tensor:
            part = norm1(part).view(-1, *shape[1:]).roll((-shift, -shift), (1, 2))
            windows = self.attn(to_windows(part, self.window), mask, repetition, qkv)
            return from_windows(windows, self.side).roll((shift, shift), (1, 2)).flatten(1, 2)

        x = add_branch(x.flatten(1, 2), x.flatten(1, 2), attention, rate, qkv is not None)
        if self.convolves:
            x = self._convolve(x.view(shape), repetition).flatten(1, 2)
        return add_branch(x, x, lambda x: self.mlp(norm2(x)), rate).view(shape)

    def _convolve(self, x: Tensor, repetition: int) -> Tensor:
        """MiniViT's transformation for the MLP: places look at their neighbours. [B, h, w, C] -> the same."""
        normalised = one_of(self.local_norm, repetition)(x)
        change = one_of(self.local_conv, repetition)(normalised.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (normalised if self.conv_on_norm else x) + change

    def flops(self) -> float:
        """Forward matmul FLOPs of one repetition."""
        places, width = self.side**2, self.attn.qkv.in_features
        windows = (self.side // self.window) ** 2
        total = windows * block_flops(self.window**2, width, self.mlp.fc1.out_features)
        return total + (2.0 * places * width * CONV_SIDE**2 if self.convolves else 0.0)


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias per offset and head."""

    index: Tensor

    def __init__(self, width: int, heads: int, window: int, repetitions: int, cfg: SwinConfig) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=cfg.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows((window, window), 0), heads))
        self.register_buffer("index", relative_index((window, window), 0), persistent=False)
        self.proj_l = each(repetitions, lambda: HeadMixing(heads, bias=True)) if cfg.mix_heads else None
        self.proj_w = each(repetitions, lambda: HeadMixing(heads, bias=True)) if cfg.mix_heads else None

    def forward(self, x: Tensor, mask: Tensor | None, repetition: int, qkv: list[Tensor] | None) -> Tensor:
        """x [B*W, M*M, C] -> the same; mask [W, M*M, M*M] is added to the scores; qkv: a list to append to."""
        projected = self.qkv(x)
        if qkv is not None:
            qkv.append(projected)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
        bias = bias_of(self.relative_position_bias_table, self.index, None)
        blocked = None  # [B*W, 1, M*M, M*M]
        if mask is not None:
            blocked = mask.repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        if self.proj_l is None or self.proj_w is None:
            attended = attend(q, k, v, bias if blocked is None else bias + blocked)
        else:
            scores = one_of(self.proj_l, repetition)((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias)
            weights = (scores if blocked is None else scores + blocked).softmax(-1)
            attended = one_of(self.proj_w, repetition)(weights) @ v
        return self.proj(attended.transpose(1, 2).flatten(2))


def each(count: int, make: Callable[[], nn.Module]) -> nn.Module:
    """One module for each repetition of a block; a plain one where there is only one."""
    return make() if count == 1 else nn.ModuleList(make() for _ in range(count))


def depthwise(width: int, bias: bool) -> nn.Conv2d:
    """A convolution that keeps the map's size and mixes no channels."""
    return nn.Conv2d(width, width, CONV_SIDE, padding=CONV_SIDE // 2, groups=width, bias=bias)


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, h, w, C] -> [B*W, M*M, C], the windows of one sample row by row."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # [B, h/M, M, w/M, M, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, side: int) -> Tensor:
    """The inverse of to_windows for a square map: [B*W, M*M, C] -> [B, side, side, C]."""
    window = round(windows.shape[1] ** 0.5)
    x = windows.view(-1, side // window, side // window, window, window, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, side, side, windows.shape[-1])


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """[W, M*M, M*M]: 0, or BLOCKED between places that only the cyclic shift has put into one window."""
    line = torch.zeros(side, dtype=torch.int64)
    line[side - window : side - shift] = 1
    line[side - shift :] = 2
    region = to_windows((3 * line[:, None] + line[None, :])[None, ..., None], window)[..., 0]
    return (region[:, :, None] != region[:, None, :]).float() * BLOCKED
