"""FairScale's FullyShardedDataParallel: weights, gradients and moments sharded, each parameter on its own.

It works on CUDA streams alone; engine.name=fsdp (FSDP2) does the same on every device, and is maintained. Here are no
flattened parameters, which would lose the groups' rates and mix frozen with trained ones.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from halfseen.config import ConfigError
from halfseen.distributed import one_process_group

from .base import Engine, batched, blocks_of, refuse_different_weights
from .fsdp import units


class FullySharded(Engine):
    """Each unit is wrapped, and what is left by the root; a parameter is a padded stretch of itself on every rank."""

    name = "fairscale"
    _collected: dict[str, Tensor] = {}  # while ``state`` runs: what it has put together already

    def place(self, student: nn.Module) -> nn.Module:
        """Wrap blocks, then the student. A gradient is reduced after every micro-batch, which costs no memory."""
        if self.world.device.type != "cuda":
            raise ConfigError(
                "engine.fairscale",
                "full",
                "FairScale's FullyShardedDataParallel needs CUDA streams, and this run is on the CPU",
                "use engine.name=fsdp, or engine.fairscale=sharded",
            )
        return self.wrap(student)

    def wrap(self, student: nn.Module) -> nn.Module:
        """The student, sharded in place; returns the root to call."""
        from fairscale.nn.data_parallel import FullyShardedDataParallel

        one_process_group(self.world)
        refuse_different_weights(student, self.world)
        self._mesh = init_device_mesh(self.world.device.type, (self.world.world,), mesh_dim_names=("shard",))
        student.to(self.world.device)
        self.shapes = {name: parameter.shape for name, parameter in student.named_parameters()}
        single = [name for name, shape in self.shapes.items() if shape.numel() == 1]
        if single:  # it tells a stretch from the whole by the shape
            raise ConfigError("engine.fairscale", "full", f"{single[0]} is one number", "use engine.name=fsdp")
        options: dict[str, Any] = {"flatten_parameters": False, "compute_device": self.world.device}
        alone = {id(unit[0]) for unit in units(blocks_of(student), student) if len(unit) == 1}
        for parent in list(student.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in alone:
                    sharded = FullyShardedDataParallel(child, reshard_after_forward=self.cfg.reshard, **options)
                    setattr(parent, name, sharded)
        root = FullyShardedDataParallel(student, **options)
        self.sharded = [module for module in root.modules() if isinstance(module, FullyShardedDataParallel)]
        return root

    def infer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Predict, then free what stays gathered: it would answer after the weights have changed."""
        answer = self.module(batch)
        self.published()
        return answer

    def over_shards(self, total: Tensor) -> Tensor:
        """Sum over ranks, of which each holds a part."""
        return self.world.sum(total)

    def published(self) -> None:
        """Free every gathered weight, so that the next forward gathers anew."""
        for module in self.sharded:
            if all(hasattr(parameter, "_full_param_padded") for parameter in module.params):  # after the first forward
                module._free_full_params()
                module._use_fp32_param_shard()

    # ------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """As everywhere; what is sharded comes in a few large messages instead of one for each tensor."""
        stretches: dict[str, Tensor] = {f"model.{name}": p for name, p in self.parameters.items()}
        stretches |= {f"ema.{name}": average for name, average in self.average.items()}
        for name, parameter in self.trained.items():
            slots = self.optimizer.state[parameter]
            stretches |= {f"optim.{name}.{slot}": value for slot, value in slots.items() if slot != "step"}
        self._collected = dict(self._collect(stretches))
        try:
            return super().state()
        finally:
            self._collected = {}

    def weight(self, name: str) -> Tensor:
        """A parameter cut along its first axis. Collective."""
        return self._read(f"model.{name}", self.parameters[name])

    def mean(self, name: str) -> Tensor:
        """A parameter's average, cut like it. Collective."""
        return self._read(f"ema.{name}", self.average[name])

    def moments(self, name: str) -> dict[str, Tensor]:
        """A parameter's moments, cut like it. Collective."""
        slots = self.optimizer.state[self.trained[name]]
        return {
            slot: value if slot == "step" else self._read(f"optim.{name}.{slot}", value)
            for slot, value in slots.items()
        }

    @torch.no_grad()
    def take(self, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        """Write every key's stretch. Collective."""
        for key, value in own.items():
            whole = given[key]
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            section, name = key.split(".", 1)
            if section == "model":
                self._write(self.parameters[name], whole)
            elif section == "ema":
                self._write(self.average[name], whole)
            elif section == "optim":
                name, slot = name.rsplit(".", 1)
                target = self.optimizer.state[self.trained[name]][slot]
                target.copy_(whole) if slot == "step" else self._write(target, whole)
            else:
                value.copy_(whole)
        self.published()

    def _write(self, stretch: Tensor, whole: Tensor) -> None:
        own = whole.reshape(-1)[self.world.rank * stretch.numel() :][: stretch.numel()]
        stretch.data.view(-1).narrow(0, 0, own.numel()).copy_(own)

    def _read(self, key: str, stretch: Tensor) -> Tensor:
        if key in self._collected:
            return self._collected[key]
        return dict(self._collect({key: stretch}))[key]

    def _collect(self, stretches: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Put tensors together from the ranks' stretches, batch by batch, and keep this rank's cut of each."""
        world = self.world.world
        for batch in batched({key: stretch.numel() * world for key, stretch in stretches.items()}):
            own = torch.cat([stretches[key].detach().reshape(-1) for key in batch])
            every = torch.empty(world, own.numel(), device=own.device)
            dist.all_gather_into_tensor(every.view(-1), own)
            parts = every.split([stretches[key].numel() for key in batch], dim=1)
            for key, part in zip(batch, parts, strict=True):
                shape = self.shapes[self._parameter_of(key)]
                whole = part.reshape(-1)[: shape.numel()].view(shape)
                yield key, distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None).clone()

    @staticmethod
    def _parameter_of(key: str) -> str:
        section, name = key.split(".", 1)
        return name.rsplit(".", 1)[0] if section == "optim" else name
