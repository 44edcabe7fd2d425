"""What model some weights belong to: told by the run they come from, else by their names and shapes."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from halfseen.config import ConfigError, Model
from halfseen.models import trunks
from halfseen.models.positions import sincos
from halfseen.models.relative import PREFIX_ROWS
from halfseen.models.sizes import SIZES
from halfseen.models.swin import SwinConfig
from halfseen.origin import config_of

HEADS = {size.width: size.heads for size in SIZES.values()}  # of the published widths, where nothing else tells
TABLE = "relative_position_bias_table"
IDLE = {"mask_token"}  # what pretraining left in a trunk (iBOT, DINOv2), which takes no part where nothing is hidden


@dataclass(frozen=True)
class Architecture:
    """A trunk, the images it is for, and where that is known from."""

    model: trunks.Section
    image_size: int  # pixels on a side
    told: str  # who told: a run's config, or the weights
    stage: str = ""  # of a run: pretrain, finetune ...
    statistics: dict[str, list[float]] = field(default_factory=dict)  # mean and std of its images, where known

    def build(self, image_size: int | None = None) -> nn.Module:
        """The trunk as ``encoder`` of a module, random weights."""
        size = image_size or self.image_size
        holder = nn.Module()
        holder.encoder = trunks.build(self.model, size)
        return holder

    @property
    def trunk(self) -> str:
        """vit, swin, timm, alternet or pyramid."""
        return trunks.KINDS[type(self.model)]

    def described(self) -> dict[str, str]:
        """Plain text for a file's metadata: enough to build the trunk again."""
        model = {
            key: value for key, value in dataclasses.asdict(self.model).items() if value != default(self.model, key)
        }
        plain: dict[str, Any] = {
            "trunk": self.trunk,
            "model": model,
            "image_size": self.image_size,
            "told_by": self.told,
        }
        if isinstance(self.model, Model):
            plain |= {"stem": self.model.stem, "patch": self.model.patch or SIZES[self.model.size].patch}
        elif isinstance(self.model, SwinConfig):
            plain["patch"] = self.model.patch
        found = {"architecture": json.dumps(plain)}
        if self.statistics:
            found["normalisation"] = json.dumps(self.statistics)
        return found | ({"stage": self.stage} if self.stage else {})


def default(section: Any, key: str) -> Any:
    """The default of a section's field."""
    return getattr(type(section)(), key)


def of_run(path: Path) -> Architecture | None:
    """What the config of the run that a folder is, or lies in, says; None if there is none."""
    file = config_of(path) if path.is_dir() else None
    if file is None:
        return None
    plain = yaml.safe_load(file.read_text())
    if plain.get("objective", {}).get("name") == "dvae":
        reason = "is a run of a discrete VAE, whose encoder is no trunk"
        fix = "name the run as target.codes.tokenizer; its weights: `halfseen export RUN OUT --part student`"
        raise ConfigError("RUN", str(path), reason, fix)
    model = trunks.section_in(plain)
    augment = plain.get("augment", {})
    statistics = {key: list(augment[key]) for key in ("mean", "std") if key in augment}
    return Architecture(model, plain["data"]["image_size"], "the run's config", plain.get("stage", ""), statistics)


def of_file(path: Path) -> Architecture | None:
    """What a .safetensors file of `halfseen convert` says of itself; None if it says nothing."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    if "architecture" not in told:
        return None
    plain = json.loads(told["architecture"])
    model = trunks.section_in({"trunk": plain["trunk"], trunks.SECTIONS[plain["trunk"]][0]: plain["model"]})
    statistics = json.loads(told.get("normalisation", "{}"))
    return Architecture(model, plain["image_size"], plain["told_by"], told.get("stage", ""), statistics)


def of_weights(
    ours: Mapping[str, Tensor], beside: Mapping[str, Any], heads: int | None, image_size: int | None
) -> Architecture:
    """The trunk that weights under our names fit.

    beside: the options of a config.json of transformers, if there is one. Raises ConfigError if something that the
    weights do not tell, such as the heads of an unusual width, is told by nobody.
    """
    trunk = {name.removeprefix("encoder."): value for name, value in ours.items() if name.startswith("encoder.")}
    stem = {"patch_embed.proj.weight", "patch_embed.proj.0.weight"} & trunk.keys()
    if not stem or not any(name.startswith(("blocks.0.", "layers.0.")) for name in trunk):
        raise ConfigError("IN", sorted(ours)[:3], "holds no whole trunk", "give a model's weights")
    swin = any(name.startswith("layers.") for name in trunk)
    found = of_swin(trunk, image_size) if swin else of_vit(trunk, beside, heads, image_size)
    with torch.device("meta"):
        built: Any = found.build()
    if strange := sorted(trunk.keys() - built.encoder.state_dict().keys() - IDLE):
        reason = f"{', '.join(strange[:3])} are parts of no trunk known here"
        raise ConfigError("IN", strange[:3], reason, "say what it is by a run's config")
    return found


def of_vit(
    trunk: Mapping[str, Tensor], beside: Mapping[str, Any], heads: int | None, image_size: int | None
) -> Architecture:
    """A ViT's options."""
    width = stem_width(trunk)
    blocks = 1 + max(int(found[1]) for name in trunk if (found := re.match(r"blocks\.(\d+)\.", name)))
    first = {name.removeprefix("blocks.0."): value for name, value in trunk.items() if name.startswith("blocks.0.")}
    tables = [value for name, value in trunk.items() if name.endswith(TABLE)]
    branches = {int(found[1]) for name in first if (found := re.match(r"attns\.(\d+)\.", name))}
    attention = "attns.0.attn." if branches else "attn."
    mlp = next(value for name, value in first.items() if name.endswith("mlp.fc1.weight"))
    table = trunk.get("pos_embed")
    named = sum(name in trunk for name in ("cls_token", "dist_token"))
    rows, grid = grid_of(table, tables, named, beside, image_size, patch_of(trunk))
    known = heads or beside.get("num_attention_heads") or told_heads(first, tables) or HEADS.get(width)
    if known is None:
        reason = f"nothing tells how many heads a trunk of {width} channels has"
        raise ConfigError("--heads", heads, reason, "give their number: usually one per 64 channels")
    fixed = table is not None and rows < 2 and torch.equal(table, sincos(width, (grid, grid), rows))
    separate = attention + "q_bias" in first
    per_block = f"{attention}{TABLE}" in first
    uses = [uses_of(trunk, block) for block in range(blocks)]
    model = Model(
        width=width,
        depth=sum(uses),
        heads=int(known),
        patch=patch_of(trunk),
        mlp_ratio=mlp.shape[0] / width,
        stem=stem_of(trunk),
        stem_norm="batch" if "patch_embed.proj.1.running_mean" in trunk else "layer",
        position="none" if table is None else "sincos" if fixed else "learned",
        position_on_class=rows > 0 or named == 0 or table is None,
        relative="block" if per_block else "shared" if tables else "none",
        class_token="cls_token" in trunk,
        distillation_token="dist_token" in trunk,
        registers=trunk["reg_token"].shape[1] if "reg_token" in trunk else 0,
        parallel=len(branches) or 1,
        share=uses[0] if len(set(uses)) == 1 else 1,
        groups=uses if len(set(uses)) > 1 else [],
        head_mixing=mixing_of(first),
        **irpe_of(first, attention, prefixed=named > 0 or "reg_token" in trunk),
        **reattention_of(trunk, blocks),
        layer_scale=1e-5 if any(re.search(r"ls[12]?\.gamma$", name) for name in first) else None,
        qkv_bias=separate or attention + "qkv.bias" in first,
        key_bias=not separate,
        norm_eps=float(beside.get("layer_norm_eps", 1e-6)),
    )
    return Architecture(model, grid * patch_of(trunk), "names and shapes of the weights")


def uses_of(trunk: Mapping[str, Tensor], block: int) -> int:
    """How many consecutive blocks one module stands for: each use of a shared one has norms of its own."""
    return sum(re.fullmatch(rf"blocks\.{block}\.norm1\.\d+\.weight", name) is not None for name in trunk) or 1


def told_heads(first: Mapping[str, Tensor], tables: list[Tensor]) -> int | None:
    """The number of heads, where a relative table or a map over heads of the first block has as many rows."""
    maps = [value for name, value in first.items() if name.endswith(".weight") and "attn.proj_l." in name]
    return tables[0].shape[1] if tables else maps[0].shape[0] if maps else None


def mixing_of(first: Mapping[str, Tensor]) -> Any:
    """MiniViT's maps over heads: none, or with or without a bias."""
    maps = [name for name in first if "attn.proj_l." in name]
    return "none" if not maps else "affine" if any(name.endswith(".bias") for name in maps) else "linear"


def irpe_of(first: Mapping[str, Tensor], attention: str, prefixed: bool) -> dict[str, Any]:
    """iRPE's options. Raises ConfigError where tables leave them open: only the published ratio is recognised.

    prefixed: tokens stand before the patches, and have a bucket of their own.
    """
    tables = {name: value for name, value in first.items() if name.startswith(f"{attention}rpe_")}
    if not tables:
        return {}
    on = "".join(letter for letter in "qkv" if any(name.startswith(f"{attention}rpe_{letter}") for name in tables))
    name, table = next(iter(tables.items()))
    buckets = table.shape[1 if "rpe_v" in name else -1] - prefixed
    method = {(49, False): "product", (7, True): "cross"}.get((buckets, ".rp_" in name))
    if method is None:
        reason = f"iRPE tables of {buckets} buckets do not tell their method and ratio"
        raise ConfigError("IN", name, reason, "say what it is by a run's config: model.irpe, model.irpe_ratio")
    mode = "bias" if name.endswith("_bias") else "contextual"
    return {"irpe": method, "irpe_on": on, "irpe_mode": mode, "irpe_shared": table.shape[0] == 1}


def reattention_of(trunk: Mapping[str, Tensor], blocks: int) -> dict[str, Any]:
    """DeepViT's re-attention, and in which blocks it is."""
    having = sorted({int(name.split(".")[1]) for name in trunk if ".attn.reattention." in name})
    if not having:
        return {}
    return {"attention": "reattention", "attention_blocks": [] if len(having) == blocks else having}


def of_swin(trunk: Mapping[str, Tensor], image_size: int | None) -> Architecture:
    """A Swin's options."""
    numbers = [found for name in trunk if (found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))]
    stages = 1 + max(int(found[1]) for found in numbers)
    distinct = [1 + max(int(found[2]) for found in numbers if int(found[1]) == stage) for stage in range(stages)]
    # Norms of a shared block are in lists, one for each use.
    share = [
        sum(f"layers.{stage}.blocks.0.norm1.{n}.weight" in trunk for n in range(64)) or 1 for stage in range(stages)
    ]
    tables = [trunk[f"layers.{stage}.blocks.0.attn.{TABLE}"] for stage in range(stages)]
    window = max((math.isqrt(len(table)) + 1) // 2 for table in tables)
    patch, width = patch_of(trunk), stem_width(trunk)
    model = SwinConfig(
        width=width,
        depths=[count * times for count, times in zip(distinct, share)],
        share=share if max(share) > 1 else [],
        mix_heads=any(".attn.proj_l." in name for name in trunk),
        local_conv=any(".local_conv." in name for name in trunk),
        heads=[table.shape[1] for table in tables],
        patch=patch,
        window=window,
        mlp_ratio=trunk["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in trunk,
        patch_norm="patch_embed.norm.weight" in trunk,
        absolute="absolute_pos_embed" in trunk,
    )
    return Architecture(model, image_size or window * patch << (stages - 1), "names and shapes of the weights")


def stem_of(trunk: Mapping[str, Tensor]) -> Any:
    """The kind of stem: one map, or a sequence whose kernels are as long as their strides or not."""
    first = trunk.get("patch_embed.proj.0.weight")
    return "patch" if first is None else "conv" if first.shape[-1] == 3 else "hmlp"


def stem_width(trunk: Mapping[str, Tensor]) -> int:
    """Channels that leave the stem."""
    convolutions = [value for name, value in trunk.items() if name.startswith("patch_embed.proj.") and value.ndim == 4]
    return max(value.shape[0] for value in convolutions)


def patch_of(trunk: Mapping[str, Tensor]) -> int:
    """Pixels on a patch's side."""
    convolutions = [value for name, value in trunk.items() if name.startswith("patch_embed.proj.") and value.ndim == 4]
    if stem_of(trunk) == "conv":
        return 2 ** len(convolutions)
    return math.prod(int(value.shape[-1]) for value in convolutions)


def grid_of(
    table: Tensor | None,
    tables: list[Tensor],
    named: int,
    beside: Mapping[str, Any],
    image_size: int | None,
    patch: int,
) -> tuple[int, int]:
    """Rows of the position table before the patches, and patches on a side: told by a table, or by the image size."""
    if table is not None:
        for rows in (named, 0):
            side = math.isqrt(table.shape[1] - rows)
            if side**2 == table.shape[1] - rows:
                return rows, side
        raise ConfigError("IN", tuple(table.shape), "a position table of no square grid", "give square images' weights")
    if tables:
        extra = PREFIX_ROWS if named else 0
        return named, (math.isqrt(len(tables[0]) - extra) + 1) // 2
    size = image_size or beside.get("image_size")
    if not size:
        reason = "nothing in the weights tells the size of the images"
        raise ConfigError("--image-size", size, reason, "give it, in pixels")
    return named, int(size) // patch
