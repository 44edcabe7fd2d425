"""Hierarchical trunks of timm as students: Swin, NesT, PVT v2, Twins and TNT.

Names are timm's, under ``body``. Shapes: B batch, h x w places, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError, between

from .staged import Hide, Staged


@dataclass
class TimmConfig:
    """A hierarchical trunk of timm with random weights; run.init takes files in timm's names."""

    name: str = "swin_tiny_patch4_window7_224"  # a model of timm: a Swin, NesT, PVT v2, Twins or TNT
    drop_path: float = 0.0  # probability of dropping a sample's residual branch; timm makes it rise over the depth
    options: dict[str, Any] = field(default_factory=dict)  # more of timm's arguments, e.g. {depths: [2, 2, 2, 2]}

    def check(self, key: str) -> None:
        """Ranges, and arguments of timm that are options elsewhere."""
        between(f"{key}.drop_path", self.drop_path, 0.0, 0.99)
        for name, option in {"num_classes": "data.classes", "drop_path_rate": f"{key}.drop_path"}.items():
            if name in self.options:
                raise ConfigError(f"{key}.options", self.options, f"{name} is not set here", f"use {option}")


@dataclass(frozen=True)
class Family:
    """How a family of timm is run with something behind its stem; without it the result is forward_features's."""

    encode: Callable[[Any, Tensor, Hide], Tensor]  # model, image, hide -> tokens after the final norm
    block: str  # class of its blocks


class TimmTrunk(Staged):
    """A model of timm without its head, as ``body``."""

    layout = "timm_hierarchical"  # what weights are read as that are not a run's own
    body: Any

    def __init__(self, cfg: TimmConfig, image_size: int) -> None:
        super().__init__()
        self.cfg, self.image_size = cfg, image_size
        self.body = build(cfg, image_size)
        self.family = FAMILIES[type(self.body).__name__]
        # Found once: engines that shard give modules classes of their own.
        self.units = [part for part in self.body.modules() if type(part).__name__ == self.family.block]
        self.patch, self.stride = sides_of(self.body, cfg, image_size)
        self.stem_width, self.width = self.body.feature_info[0]["num_chs"], self.body.num_features
        self.grid = (image_size // self.stride, image_size // self.stride)
        self.tokens = self.grid[0] * self.grid[1]
        self.prefix = getattr(self.body, "num_prefix_tokens", 0)
        self.depth = len(self.units)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of all stages in order."""
        return nn.ModuleList(self.units)

    @property
    def norm(self) -> nn.Module:
        """The final norm; PVT v2's is in its last stage."""
        return self.body.norm if hasattr(self.body, "norm") else self.body.stages[-1].norm

    def encode(self, image: Tensor, hide: Hide) -> Tensor:
        """See Staged."""
        return self.family.encode(self.body, image, hide)

    def layer_ids(self) -> dict[str, int]:
        """Layer of each parameter for layer-wise rates, as timm numbers them (group_matcher)."""
        from timm.models import group_parameters

        matcher = self.body.group_matcher(coarse=False)
        return {f"body.{name}": layer for name, layer in group_parameters(self.body, matcher, reverse=True).items()}


def build(cfg: TimmConfig, image_size: int) -> nn.Module:
    """timm's model without a head. Raises ConfigError if timm has none, or if it is of no family known here."""
    import timm

    options = {"num_classes": 0, "drop_path_rate": cfg.drop_path} | cfg.options
    try:
        try:
            model = timm.create_model(cfg.name, img_size=image_size, **options)
        except TypeError:  # PVT v2 has no fixed grid and no such argument
            model = timm.create_model(cfg.name, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError) as error:
        reason = f"timm cannot make it for {image_size} pixels: {type(error).__name__}: {error}"
        fix = "see timm.list_models(), the options of its constructor, and data.image_size"
        raise ConfigError("timm.name", cfg.name, reason, fix) from error
    if type(model).__name__ not in FAMILIES:
        reason = f"a {type(model).__name__} is none of {', '.join(FAMILIES)}"
        raise ConfigError("timm.name", cfg.name, reason, "use a model of these families, or trunk=vit")
    return model


def sides(cfg: TimmConfig, image_size: int) -> tuple[int, int]:
    """Pixels on the side of a place of the stem and of the last stage. Builds no tensor."""
    with torch.device("meta"):
        return sides_of(build(cfg, image_size), cfg, image_size)


def sides_of(body: Any, cfg: TimmConfig, image_size: int) -> tuple[int, int]:
    """As sides, of a model that exists. Raises ConfigError unless they divide the image."""
    patch, stride = (body.feature_info[place]["reduction"] for place in (0, -1))
    if image_size % stride:
        near = max(stride, round(image_size / stride) * stride)
        reason = f"{cfg.name} halves its map until a place is {stride} pixels, which does not divide the image"
        raise ConfigError("data.image_size", image_size, reason, f"use e.g. {near}")
    return patch, stride


# ------------------------------------------------------------------------------------------------- families


def swin(body: Any, image: Tensor, hide: Hide) -> Tensor:
    """Swin Transformer (Liu et al., 2021)."""
    return body.norm(body.layers(hide(body.patch_embed(image)))).flatten(1, 2)


def nest(body: Any, image: Tensor, hide: Hide) -> Tensor:
    """NesT (Zhang et al., 2021): maps are channels-first between its levels."""
    places = hide(body.patch_embed(image).permute(0, 2, 3, 1))
    return body.norm(body.levels(places.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)


def pvt_v2(body: Any, image: Tensor, hide: Hide) -> Tensor:
    """PVT v2 (Wang et al., 2021): each stage ends in a norm."""
    return body.stages(hide(body.patch_embed(image))).flatten(2).transpose(1, 2)


def twins(body: Any, image: Tensor, hide: Hide) -> Tensor:
    """Twins (Chu et al., 2021): a PEG behind the first block of each stage."""
    plane = tokens = image
    stages = zip(body.patch_embeds, body.pos_drops, body.blocks, body.pos_block)
    for stage, (merge, drop, blocks, peg) in enumerate(stages):
        tokens, grid = merge(plane)
        tokens = drop(hide(tokens.unflatten(1, grid)).flatten(1, 2) if stage == 0 else tokens)
        for number, block in enumerate(blocks):
            tokens = block(tokens, grid)
            tokens = peg(tokens, grid) if number == 0 else tokens
        plane = tokens.transpose(1, 2).unflatten(2, grid)
    return body.norm(tokens)


def tnt(body: Any, image: Tensor, hide: Hide) -> Tensor:
    """TNT (Han et al., 2021): hidden are the patches; the pixels inside them are grey already."""
    pixels = body.pixel_embed(image, body.pixel_pos)
    patches = body.proj(body.norm1_proj(pixels.reshape(len(image), body.num_patches, -1)))
    patches = hide(body.norm2_proj(patches).unflatten(1, body.pixel_embed.grid_size)).flatten(1, 2)
    patches = body.pos_drop(torch.cat([body.cls_token.expand(len(image), -1, -1), patches], dim=1) + body.patch_pos)
    for block in body.blocks:
        pixels, patches = block(pixels, patches)
    return body.norm(patches)


FAMILIES = {
    "SwinTransformer": Family(swin, "SwinTransformerBlock"),
    "Nest": Family(nest, "TransformerLayer"),
    "PyramidVisionTransformerV2": Family(pvt_v2, "Block"),
    "Twins": Family(twins, "Block"),
    "TNT": Family(tnt, "Block"),
}
