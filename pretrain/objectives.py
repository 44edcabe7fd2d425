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
from halfseen.models.swin import Swin

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
    kind = config.mask.kind
    if kind not in masks.EVEN:
        reason = "MAE encodes equally many visible patches of every image, and predicts as many hidden ones"
        raise ConfigError("mask.kind", kind, reason, f"use one of {masks.EVEN}")
    encoder = ViT(config.model, config.data.image_size)
    return MAE(encoder, config.objective.mae, masks.hidden(config), target)


def mim(config: Pretrain, target: Target) -> nn.Module:
    """BEiT's form: the trunk sees all tokens, hidden ones replaced by a mask token."""
    if config.trunk == "swin":
        swin = Swin(config.swin, config.data.image_size)
        return SimMIM(swin, config.objective.mim, masks.hidden(config), target, config.patch)
    return MIM(ViT(config.model, config.data.image_size), config.objective.mim, masks.hidden(config), target)


def fd(config: Pretrain, target: Target) -> nn.Module:
    """Feature Distillation: nothing hidden, every token predicted."""
    if masks.hidden(config):
        reason = "Feature Distillation shows the student the whole image"
        raise ConfigError("mask.kind", config.mask.kind, reason, "use mask.kind=none, or objective.name=mim")
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
    refuse_mask(config)
    return VQKD(ViT(config.model, config.data.image_size), config.objective.vqkd, target, config.run.seed)


def dvae(config: Pretrain, target: Target) -> nn.Module:
    """A discrete VAE on pixels."""
    refuse_mask(config)
    if config.target.name != "pixels" or config.target.normalise:
        reason = "a discrete VAE gives back the image's own pixels"
        raise ConfigError("target.name", config.target.name, reason, "use target={name: pixels, normalise: false}")
    return DVAE(config.objective.dvae, config.patch, config.grid, target)


def refuse_mask(config: Pretrain) -> None:
    """Raise ConfigError if anything is hidden from a tokenizer."""
    if config.mask.kind != "none":
        raise ConfigError("mask.kind", config.mask.kind, "a tokenizer sees the whole image", "use mask.kind=none")


OBJECTIVES: dict[str, Callable[[Pretrain, Target], nn.Module]] = {
    "mae": mae,
    "mim": mim,
    "fd": fd,
    "data2vec": data2vec,
    "beit2": beit2,
    "vqkd": vqkd,
    "dvae": dvae,
}


def create(config: Pretrain, target: Target) -> nn.Module:
    """The student a config names, with random weights, on the CPU."""
    return OBJECTIVES[config.objective.name](config, target)
