"""FairScale's FullyShardedDataParallel: weights, gradients and moments sharded, each parameter on its own.

It works on CUDA streams alone; engine.name=fsdp (FSDP2) does the same on every device, and is maintained. Here are no
flattened parameters, which would lose the groups' rates and mix frozen with trained ones.
"""

from typing import Any

from torch import Tensor, nn

from halfseen.checkpoint.stretch import Stretch
from halfseen.config import ConfigError
from halfseen.distributed import one_process_group

from .base import Engine
from .fsdp import units
from .student import blocks_of, refuse_different_weights


class FullySharded(Engine):
    """Each unit is wrapped, and what is left by the root; a parameter is a padded stretch of itself on every rank."""

    name = "fairscale"

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

    def weight(self, name: str) -> Tensor:
        """This rank's stretch of a parameter."""
        return self._stretch(name, self.parameters[name])

    def mean(self, name: str) -> Tensor:
        """This rank's stretch of a parameter's average."""
        return self._stretch(name, self.average[name])

    def moments(self, name: str) -> dict[str, Tensor]:
        """This rank's stretch of a parameter's moments."""
        slots = self.optimizer.state[self.trained[name]]
        return {slot: value if slot == "step" else self._stretch(name, value) for slot, value in slots.items()}

    def _stretch(self, name: str, padded: Tensor) -> Stretch:
        return Stretch.nth(padded, self.shapes[name], self.world.rank)
