"""What a choice of engine needs before it starts: memory of a device, disk of a checkpoint, a package."""

from halfseen import engine_config

WORD = 4  # bytes of one fp32 number: weights, gradients, moments and averages are all fp32


def memory(cfg: engine_config.Engine, parameters: int, trained: int, world: int) -> int:
    """Bytes a device needs before the first activation; activations, buffers and the allocator's gaps come on top.

    parameters: numbers in the student. trained: those of them that train. world: ranks. Two moments are counted,
    as AdamW and LAMB have them.
    """
    weights, gradients, moments = WORD * parameters, WORD * trained, 2 * WORD * trained
    averages = WORD * trained if cfg.ema else 0
    group = cfg.shard_size or world
    if cfg.name == "fsdp" and cfg.offload:
        return 0  # all of it lives on the host; a block at a time is gathered beside the activations
    if cfg.name == "fsdp" or (cfg.name == "fairscale" and cfg.fairscale == "full"):
        return (weights + gradients + moments + averages) // group
    if cfg.name == "deepspeed" and cfg.zero_stage:
        masters = WORD * trained  # it updates a copy of its part
        if cfg.offload:
            masters = moments = averages = 0
        shared = masters + moments + averages
        shared += {1: 0, 2: gradients, 3: gradients + weights}[cfg.zero_stage]
        return {1: weights + gradients, 2: weights, 3: 0}[cfg.zero_stage] + shared // world
    if cfg.name == "fairscale":
        shared = moments + (gradients if cfg.fairscale == "sharded" else 0)
        return weights + gradients + moments + averages - shared + shared // world
    return weights + gradients + moments + averages


def checkpoint(cfg: engine_config.Engine, parameters: int, trained: int) -> int:
    """Bytes of one checkpoint: weights, two moments of what trains, and the average if there is one."""
    return WORD * (parameters + 2 * trained + (trained if cfg.ema else 0))


def package(cfg: engine_config.Engine) -> str:
    """The name to import for an engine."""
    return cfg.name if cfg.name in ("deepspeed", "fairscale") else "torch"
