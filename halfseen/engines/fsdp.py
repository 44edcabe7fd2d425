"""FSDP2: weights, gradients and moments sharded per block; HSDP when engine.shard_size is set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from halfseen.config import ConfigError
from halfseen.distributed import one_process_group

from .base import Engine
from .student import blocks_of, refuse_different_weights, uses


class Sharded(Engine):
    """``fully_shard`` on each block and on the rest.

    By default weights are gathered in fp32 and cast by autocast: the same operators run in the same precision as
    under DDP, so the curve does not change with the engine. engine.gather=bf16 is a MixedPrecisionPolicy for the
    units: their weights travel in bf16, for half the traffic, and so do activations from one to the next; norms and
    biases lose digits too, and the uses of a shared weight are summed in bf16. Gradients are reduced in fp32 always.
    """

    name = "fsdp"

    def place(self, student: nn.Module) -> nn.Module:
        """Shard the units, then what is left; each moves to the device on its own, never all at once."""
        one_process_group(self.world)
        refuse_different_weights(student, self.world)
        self.mesh = mesh(self.world.world, self.cfg.shard_size, self.world.device.type)
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if self.cfg.offload else OffloadPolicy()
        travel = torch.bfloat16 if self.cfg.gather == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=travel, reduce_dtype=torch.float32)
        for unit in units(blocks_of(student), student):
            fully_shard(
                unit if len(unit) > 1 else unit[0],
                mesh=self.mesh,
                reshard_after_forward=self.cfg.reshard,
                mp_policy=policy,
                offload_policy=offload,
            )
        # The rest stays fp32: a policy there would round the batch too, targets among it.
        fully_shard(student, mesh=self.mesh, offload_policy=offload)
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
        total = total.to(self.world.device)
        dist.all_reduce(total, group=self.mesh.get_group("shard"))
        return total

    def update(self, gradients: list[Tensor], factor: Tensor | None, found: Tensor) -> None:
        """As everywhere; with engine.offload on the host, which waits for the device to decide."""
        if self.cfg.offload:
            factor, found = factor if factor is None else factor.cpu(), found.cpu()
        super().update(gradients, factor, found)


def mesh(world: int, shard_size: int, device_type: str) -> DeviceMesh:
    """One shard group, or with shard_size > 0 a (replicate, shard) grid of world / shard_size groups."""
    size = shard_size or world
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
    for name, parameter, place in uses(student, blocks):
        if place < 0 and id(parameter) in holder:
            raise ConfigError(
                "engine.name",
                "fsdp",
                f"{name} is also in block {holder[id(parameter)]}, which is sharded on its own",
                "use engine.name=ddp, or offer the two as one block",
            )
    return [[block for block, own in zip(blocks, group_of) if own == group] for group in dict.fromkeys(group_of)]
