"""The registry of objectives: how a config becomes a student.

A student is a module with its loss. ``forward(batch)`` takes image float [B, 3, H, W] normalised, mask bool [B, N]
(True = hidden) and target, and returns scalars with ``loss``; with batch["task"] == "predict" it needs no target and
returns {"prediction": [B, N, target.width], ...}. ``blocks()`` lists the units to shard, recompute and compile;
``train_flops_per_image()`` counts the matrix products of a training step.
"""

from collections.abc import Callable

from torch import nn

from halfseen.config import ConfigError
from halfseen.models import ViT
from halfseen.models.trunks import trunk_of

from . import masks
from .beit2 import BEiT2
from .config import Pretrain
from .data2vec import Data2Vec
from .feature_distillation import FeatureDistillation
from .mae import MAE
from .mim import MIM
from .simmim import SimMIM
from .targets import Target
from .targets.features import Average, Features
from .tokenizers import DVAE, VQKD


def mae(config: Pretrain, target: Target) -> nn.Module:
    """MAE: the trunk sees visible patches alone, a small decoder fills in the others."""
    encoder = ViT(config.model, config.data.image_size)
    return MAE(encoder, config.objective.mae, masks.hidden(config), target)


def mim(config: Pretrain, target: Target) -> nn.Module:
    """BEiT's form: the trunk sees all tokens, hidden ones replaced by a mask token."""
    trunk = trunk_of(config)
    if isinstance(trunk, ViT):
        return MIM(trunk, config.objective.mim, masks.hidden(config), target)
    return SimMIM(trunk, config.objective.mim, masks.hidden(config), target, config.patch)


def fd(config: Pretrain, target: Target) -> nn.Module:
    """Feature Distillation: nothing hidden, every token predicted."""
    if not isinstance(target, Features):
        raise ConfigError("target.name", config.target.name, "is not a teacher's features", "use features")
    return FeatureDistillation(ViT(config.model, config.data.image_size), config.objective.fd, target)


def data2vec(config: Pretrain, target: Target) -> nn.Module:
    """data2vec: mim whose answers are its own averaged weights'."""
    if not isinstance(target, Average):
        raise ConfigError("target.name", config.target.name, "is not the student's own average", "use average")
    if not config.engine.ema:
        reason = "data2vec learns from averaged weights"
        raise ConfigError("engine.ema", config.engine.ema, reason, "set their decay, e.g. engine.ema=0.9998")
    trunk = ViT(config.model, config.data.image_size)
    return Data2Vec(trunk, config.objective.mim, masks.hidden(config), target)


def beit2(config: Pretrain, target: Target) -> nn.Module:
    """BEiT v2: mim, and the same prediction through the class token."""
    trunk = ViT(config.model, config.data.image_size)
    return BEiT2(trunk, config.objective.beit2, masks.hidden(config), target)


def vqkd(config: Pretrain, target: Target) -> nn.Module:
    """BEiT v2's tokenizer."""
    return VQKD(ViT(config.model, config.data.image_size), config.objective.vqkd, target, config.run.seed)


def dvae(config: Pretrain, target: Target) -> nn.Module:
    """A discrete VAE on pixels."""
    if config.target.name != "pixels" or config.target.normalise:
        reason = "a discrete VAE gives back the image's own pixels"
        raise ConfigError("target.name", config.target.name, reason, "use target={name: pixels, normalise: false}")
    return DVAE(config.objective.dvae, config.patch, config.grid, target)


OBJECTIVES: dict[str, Callable[[Pretrain, Target], nn.Module]] = {
    "mae": mae,
    "mim": mim,
    "fd": fd,
    "data2vec": data2vec,
    "beit2": beit2,
    "vqkd": vqkd,
    "dvae": dvae,
}


# Objectives that hide nothing, and why.
WHOLE = {
    "fd": "Feature Distillation shows the student the whole image",
    "vqkd": "a tokenizer sees the whole image",
    "dvae": "a tokenizer sees the whole image",
}


def refuse_mask(config: Pretrain) -> None:
    """Raise ConfigError if the mask cannot be drawn, or the objective cannot use it.

    The config alone tells, so this is asked before the target loads a teacher or a tokenizer.
    """
    name, kind = config.objective.name, config.mask.kind
    masks.hidden(config)
    if name in WHOLE and kind != "none":
        raise ConfigError("mask.kind", kind, WHOLE[name], "use mask.kind=none")
    if name == "beit2" and kind == "none":
        raise ConfigError("mask.kind", kind, "BEiT v2 predicts hidden patches", "use mask.kind=block")
    if name == "mae" and kind not in masks.EVEN:
        reason = "MAE encodes equally many visible patches of every image, and predicts as many hidden ones"
        raise ConfigError("mask.kind", kind, reason, f"use one of {masks.EVEN}")


def create(config: Pretrain, target: Target) -> nn.Module:
    """The student a config names, with random weights, on the CPU."""
    refuse_mask(config)
    return OBJECTIVES[config.objective.name](config, target)
