"""Tokenizers: networks that say which of a fixed set of codes each patch is; trained here, or loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from halfseen import layouts
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.sizes import resolve
from halfseen.origin import config_of
from halfseen.teachers import section

from .dvae import DVAE, DallE, DVAEConfig, Encoder
from .quantizer import QuantizerConfig
from .vqkd import VQKD, Coder, VQKDConfig

__all__ = ["DVAE", "VQKD", "Coder", "DVAEConfig", "DallE", "Tokenizer", "VQKDConfig", "load"]

KEY = "target.codes.tokenizer"


@dataclass(frozen=True)
class Tokenizer:
    """A frozen tokenizer. module.codes(image float [B, 3, S, S] normalised by statistics) gives int64 [B, N]."""

    module: Any
    name: str
    codes: int  # how many there are
    patch: int  # pixels on the side of what one code stands for
    image_size: int | None  # pixels it is built for; None: any multiple of patch
    statistics: tuple[Sequence[float], Sequence[float]]  # mean and deviation per channel, of values in [0, 1]


def load(source: str, heads: int = 0) -> Tokenizer:
    """The tokenizer of a run, a checkpoint or a weights file, on the CPU. ConfigError if it is none."""
    if not source:
        raise ConfigError(KEY, "", "names no tokenizer", "e.g. a run folder of pretrain/vqkd_b16, or a weights file")
    path = Path(source)
    try:
        weights = read_weights(path)
    except ConfigError as refused:
        fix = refused.fix
        if path.suffix == ".pkl":
            fix = "a pickled module can run any code: load it where you trust it and torch.save its state_dict as .pth"
        raise ConfigError(KEY, source, refused.reason, fix) from refused
    config = config_of(path) if path.is_dir() else None
    if config is not None:
        return from_run(source, yaml.safe_load(config.read_text()), weights)
    layout = layouts.detect(weights)
    if layout.name == "dalle":
        return dalle(source, layout.take(weights))
    if layout.name in ("vqkd", "halfseen") and "quantizer.codebook" in (given := layout.take(weights)):
        return vqkd(source, given, heads, metadata(path))
    raise ConfigError(KEY, source, f"holds weights of {layout.what}", "give VQ-KD's, DALL-E's encoder, or an own run")


def from_run(source: str, plain: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tokenizer:
    """The tokenizer that one of our runs trained; what it needed for training only is left out."""
    objective, model = plain.get("objective", {}), section(Model, plain.get("model", {}))
    size, augment, patch = plain["data"]["image_size"], plain["augment"], resolve(model).patch
    module: Coder | Encoder
    if objective.get("name") == "vqkd":
        module = Coder(ViT(model, size), section(VQKDConfig, objective["vqkd"]).quantizer)
    elif objective.get("name") == "dvae":
        module = Encoder(section(DVAEConfig, objective["dvae"]), patch)
    else:
        reason = f"is a run of objective.name={objective.get('name')}, which trains no tokenizer"
        raise ConfigError(KEY, source, reason, "give a run of vqkd or dvae")
    fill(module, weights, source)
    built = size if objective["name"] == "vqkd" else None
    return Tokenizer(module, source, module.count, patch, built, (augment["mean"], augment["std"]))


def metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself; `halfseen convert` writes its architecture and normalisation there."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def vqkd(
    source: str, weights: Mapping[str, Tensor], heads: int = 0, told: Mapping[str, str] | None = None
) -> Tokenizer:
    """A VQ-KD tokenizer from weights under our names.

    Its shape is the one the file tells (see metadata), else read from the weights. Images -1 .. 1, as published, unless
    told otherwise.
    """
    told = told or {}
    if "architecture" in told:
        plain = json.loads(told["architecture"])
        model, size = section(Model, plain["model"]), plain["image_size"]
    else:
        model, size = published(source, weights, heads)
    statistics = json.loads(told.get("normalisation", "{}"))
    codes, small = weights["quantizer.codebook"].shape
    module = Coder(ViT(model, size), QuantizerConfig(codes=codes, width=small))
    strange = [name for name in weights if name.startswith("encoder.") and name not in module.state_dict()]
    if strange:
        reason = f"holds {strange[0]}, and nothing tells what trunk that is of"
        raise ConfigError(KEY, source, reason, "give the run, or a file that `halfseen convert` made of it")
    fill(module, weights, source)
    half = (0.5,) * 3
    images = (statistics.get("mean", half), statistics.get("std", half))
    return Tokenizer(module, source, codes, resolve(model).patch, size, images)


def published(source: str, weights: Mapping[str, Tensor], heads: int) -> tuple[Model, int]:
    """The trunk of an official VQ-KD file and its images' pixels, from the shapes of the weights."""
    stem, table = weights.get("encoder.patch_embed.proj.weight"), weights.get("encoder.pos_embed")
    if stem is None or table is None:
        reason = "has no plain stem with a position table, and nothing tells what trunk that is"
        raise ConfigError(KEY, source, reason, "give the run, or a file that `halfseen convert` made of it")
    width, patch = stem.shape[0], stem.shape[-1]
    side = round((table.shape[1] - 1) ** 0.5)
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.blocks."))
    if width % (heads or 64):
        reason = f"a trunk of {width} channels has another number of heads, which {source} does not tell"
        raise ConfigError("target.codes.heads", heads, reason, "give their number; the run's config.yaml has it")
    model = Model(
        width=width,
        depth=depth,
        heads=heads or width // 64,
        patch=patch,
        mlp_ratio=weights["encoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
        key_bias=False,
        qkv_bias="encoder.blocks.0.attn.q_bias" in weights,
    )
    return model, side * patch


def dalle(source: str, weights: Mapping[str, Tensor]) -> Tokenizer:
    """DALL-E's encoder from weights under our names; its shape is read from them. Images 0 .. 1."""
    blocks = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("groups.0."))
    codes, width = weights["output.weight"].shape[0], weights["input.weight"].shape[0]
    module = DallE(width, blocks, codes)
    fill(module, weights, source)
    return Tokenizer(module, source, codes, module.patch, None, ((0.0,) * 3, (1.0,) * 3))


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load every weight of a tokenizer; ConfigError if one is missing, of another shape or not finite."""
    wanted = {name: weights[name] for name in module.state_dict() if name in weights}
    try:
        module.load_state_dict(wanted)
    except RuntimeError as error:
        reason = "does not fit: " + " ".join(str(error).split())[:300]
        raise ConfigError(KEY, source, reason, "give the weights of exactly this tokenizer") from error
    odd = [name for name, value in wanted.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if odd:
        raise ConfigError(KEY, source, f"{odd[0]} holds NaN or infinity", "use an earlier checkpoint")
