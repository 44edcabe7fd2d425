"""Engines: how a student is sharded, run and updated. Only this package knows their names."""

from torch import nn

from halfseen import config
from halfseen.distributed import World
from halfseen.optim import Group

from .base import Engine

__all__ = ["Engine", "create"]


def create(
    cfg: config.Engine,
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
    if name == "fairscale":
        from .fairscale import FairScale

        return FairScale(cfg, student, optim, groups, world, seed)
    known = "auto, single, ddp, fsdp, deepspeed or fairscale"
    raise config.ConfigError("engine.name", name, "no such engine", f"use {known}")
