"""FSDP2: weights, gradients and moments sharded per block; HSDP when engine.shard_size is set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from halfseen.config import ConfigError
from halfseen.distributed import one_process_group

from .base import Engine, blocks_of


class Sharded(Engine):
    """``fully_shard`` on each block and on the rest.

    Weights are gathered in fp32 and cast by autocast, not by a MixedPrecisionPolicy: the same operators run
    in the same precision as under DDP, so the curve does not change with the engine. Gradients are reduced
    in fp32.
    """

    name = "fsdp"

    def place(self, student: nn.Module) -> nn.Module:
        """Shard the units, then what is left; each moves to the device on its own, never all at once."""
        one_process_group(self.world)
        self._refuse_different_weights(student)
        self.mesh = mesh(self.world.world, self.cfg.shard_size, self.world.device.type)
        for unit in units(blocks_of(student), student):
            fully_shard(unit if len(unit) > 1 else unit[0], mesh=self.mesh, reshard_after_forward=self.cfg.reshard)
        fully_shard(student, mesh=self.mesh)
        return student

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Reduce gradients over ranks in the last backward only."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        yield

    def infer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Predict, then free what was gathered.

        No backward follows to free the root (and, with engine.reshard=false, the blocks). Left gathered, they would
        answer the next forward too, even after the weights have changed.
        """
        answer = self.module(batch)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return answer

    def over_shards(self, total: Tensor) -> Tensor:
        """Sum over the ranks that hold different shards (replicas of HSDP hold the same)."""
        dist.all_reduce(total, group=self.mesh.get_group("shard"))
        return total

    def _refuse_different_weights(self, student: nn.Module) -> None:
        with torch.no_grad():
            totals = [parameter.double().abs().sum() for parameter in student.parameters()]
        seen = self.world.gather_object(torch.stack(totals).tolist())
        for rank, other in enumerate(seen):
            if other != seen[0]:
                raise RuntimeError(f"rank {rank} starts from other weights than rank 0: seed them alike on every rank")


def mesh(world: int, shard_size: int, device_type: str) -> DeviceMesh:
    """One shard group, or with shard_size > 0 a (replicate, shard) grid of world / shard_size groups."""
    size = shard_size or world
    if world % size:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise ConfigError("engine.shard_size", shard_size, f"does not divide the {world} ranks", f"use one of {fits}")
    if size == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def units(blocks: list[nn.Module], student: nn.Module) -> list[list[nn.Module]]:
    """Blocks grouped so that no parameter lies in two units.

    FSDP2 would shard a tensor once per unit and so untie it (silently, on some versions of torch). A tensor
    shared between a block and the rest of the student cannot be grouped and is refused.
    """
    group_of: list[int] = list(range(len(blocks)))
    holder: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            first = group_of[holder.setdefault(id(parameter), index)]
            group_of = [first if group == group_of[index] else group for group in group_of]
    inside = {id(module) for block in blocks for module in block.modules()}
    for path, module in student.named_modules():
        if id(module) in inside:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) in holder:
                raise ConfigError(
                    "engine.name",
                    "fsdp",
                    f"{name} is also in block {holder[id(parameter)]}, which is sharded on its own",
                    "use engine.name=ddp, or offer the two as one block",
                )
    return [[block for block, own in zip(blocks, group_of) if own == group] for group in dict.fromkeys(group_of)]
