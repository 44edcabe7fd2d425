"""What an engine finds in a student before it takes it, and what it refuses."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.models.norm import synchronise


def blocks_of(student: nn.Module) -> list[nn.Module]:
    """The student's structural hint: units to shard, recompute and compile, each once."""
    return list(dict.fromkeys(cast(Any, student).blocks()))


def uses(student: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Every place of every parameter: its name there, and the number of the block it lies in, -1 outside of them.

    What torch's own listings leave out is what matters here: the second place of a tensor, or of a module.
    """
    numbers = {id(block): number for number, block in enumerate(blocks)}

    def below(module: nn.Module, place: str, block: int) -> Iterator[tuple[str, nn.Parameter, int]]:
        block = numbers.get(id(module), block)
        for name, parameter in module.named_parameters(place, recurse=False):
            yield name, parameter, block
        for name, child in module.named_children():
            yield from below(child, f"{place}.{name}" if place else name, block)

    return below(student, "", -1)


def aliases(student: nn.Module) -> dict[str, str]:
    """Other names of tied parameters and buffers -> the first name, which is the one that is saved."""
    found: dict[str, str] = {}
    for listed in (student.named_parameters, student.named_buffers):
        first = {id(tensor): name for name, tensor in listed()}
        every = ((name, first[id(tensor)]) for name, tensor in listed(remove_duplicate=False))
        found |= {name: canonical for name, canonical in every if name != canonical}
    return found


def refuse_different_weights(student: nn.Module, world: World) -> None:
    """Raise RuntimeError where ranks do not start alike: each would shard its own weights. Collective."""
    with torch.no_grad():
        totals = [parameter.double().abs().sum() for parameter in student.parameters()]
    seen = world.gather_object(torch.stack(totals).tolist())
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise RuntimeError(f"rank {rank} starts from other weights than rank 0: seed them alike on every rank")


def refuse_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError for a type the device does not compute in."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError("engine.precision", precision, f"{name} has no bf16", "use engine.precision=fp16 or fp32")


def synchronise_batch_norm(student: nn.Module, world: World) -> nn.Module:
    """BatchNorm statistics over all ranks."""
    if world.world == 1 or not any(isinstance(module, _BatchNorm) for module in student.modules()):
        return student
    return synchronise(student, cpu=world.device.type == "cpu")
