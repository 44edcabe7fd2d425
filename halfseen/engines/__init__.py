"""Engines: how a student is sharded, run and updated. Only this package knows their names."""

import importlib.util

from torch import nn

from halfseen import config, engine_config
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.optim import Group

from .base import Engine

__all__ = ["Engine", "create", "refuse"]


def refuse(cfg: engine_config.Engine, optim: config.Optim, world: int | None) -> None:
    """Raise ConfigError for what this engine cannot do on so many ranks. Touches no device, starts no process group.

    world: None where it is not known yet, as in a process that only launches the run.
    """
    if cfg.name in ("deepspeed", "fairscale") and importlib.util.find_spec(cfg.name) is None:
        alternative = "engine.name=fsdp" if cfg.name == "deepspeed" else "engine.name=deepspeed engine.zero_stage=1"
        fix = f"pip install {cfg.name}, or use {alternative}"
        raise ConfigError("engine.name", cfg.name, "the package is not installed", fix)
    if cfg.name == "single" and (world or 1) > 1:
        fix = "use engine.name=auto, ddp or fsdp"
        raise ConfigError("engine.name", "single", f"this run has {world} ranks", fix)
    if cfg.shard_size and world and world % cfg.shard_size:
        fits = [count for count in range(1, world + 1) if world % count == 0]
        reason = f"does not divide the {world} ranks"
        raise ConfigError("engine.shard_size", cfg.shard_size, reason, f"use one of {fits}")
    if cfg.name == "deepspeed":
        from . import deepspeed_options

        deepspeed_options.refuse(cfg, optim)
    if cfg.name == "fairscale":
        from . import fairscale

        fairscale.refuse(cfg, optim)


def create(
    cfg: engine_config.Engine,
    student: nn.Module,
    optim: config.Optim,
    groups: list[Group],
    world: World,
    seed: int,
) -> Engine:
    """Prepare a student for training. Collective; the student is changed in place and belongs to the engine.

    What trains must be final (``requires_grad``), the weights the same on every rank. groups: from
    halfseen.optim.groups.
    """
    refuse(cfg, optim, world.world)
    name = cfg.name if cfg.name != "auto" else ("single" if world.world == 1 else "ddp")
    if name == "single":
        from .single import Single

        return Single(cfg, student, optim, groups, world, seed)
    if name == "ddp":
        from .ddp import Replicated

        return Replicated(cfg, student, optim, groups, world, seed)
    if name == "fsdp":
        from .fsdp import Sharded

        return Sharded(cfg, student, optim, groups, world, seed)
    if name == "deepspeed":
        from .deepspeed import DeepSpeed

        return DeepSpeed(cfg, student, optim, groups, world, seed)
    if name == "fairscale" and cfg.fairscale == "full":
        from .fairscale_fsdp import FullySharded

        return FullySharded(cfg, student, optim, groups, world, seed)
    if name == "fairscale":
        from .fairscale import FairScale

        return FairScale(cfg, student, optim, groups, world, seed)
    known = "auto, single, ddp, fsdp, deepspeed or fairscale"
    raise ConfigError("engine.name", name, "no such engine", f"use {known}")
