"""The registry of objectives: how a config becomes a student.

A student is a module with its loss. ``forward(batch)`` takes image float [B, 3, H, W] normalised, mask bool [B, N]
(True = hidden) and target, and returns scalars with ``loss``; with batch["task"] == "predict" it needs no target and
returns {"prediction": [B, N, target.width], ...}. ``blocks()`` lists the units to shard, recompute and compile;
``train_flops_per_image()`` counts the matrix products of a training step.
"""

import math
from collections.abc import Callable

from torch import nn

from halfseen.models import ViT

from .config import Pretrain
from .mae import MAE
from .targets import Target


def mae(config: Pretrain, target: Target) -> nn.Module:
    """MAE: the trunk sees visible patches alone, a small decoder fills in the others."""
    hidden = config.mask.hidden(math.prod(config.grid))
    return MAE(ViT(config.model, config.data.image_size), config.objective.mae, hidden, target)


OBJECTIVES: dict[str, Callable[[Pretrain, Target], nn.Module]] = {"mae": mae}


def create(config: Pretrain, target: Target) -> nn.Module:
    """The student a config names, with random weights, on the CPU."""
    return OBJECTIVES[config.objective.name](config, target)
