"""DeepSpeed: ZeRO stages 0 to 3 around the same step, optimizer and checkpoint as every other engine.

DeepSpeed gathers, reduces and shards. Accumulation, clipping, loss scale, skipping and averages stay halfseen's: it is
told which micro-batch is the last, and gets no clipping, no scaler and no optimizer of its own. What is read of its
insides -- the flat fp32 partitions, where each parameter lies in them, the averaged gradients -- is not public, was
written against 0.19, and is all in this file.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.checkpoint.stretch import Stretch
from halfseen.config import ConfigError
from halfseen.distributed import World, one_process_group

from .base import AUTOCAST, Engine
from .deepspeed_options import derive


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of a flattened parameter lie in flat number ``flat`` from ``offset`` on."""

    flat: int
    offset: int
    start: int
    count: int


NOTHING = Piece(0, 0, 0, 0)  # of a parameter that other ranks hold


class DeepSpeed(Engine):
    """One class for all stages: 0 is plain replication, 1 shards moments, 2 gradients too, 3 weights too."""

    name = "deepspeed"

    # ------------------------------------------------------------------------------------------ preparation

    def place(self, student: nn.Module) -> nn.Module:
        """Move the student to the device; DeepSpeed takes it over once there is an optimizer."""
        one_process_group(self.world)
        return student.to(self.world.device)

    def adopt(self, module: nn.Module) -> nn.Module:
        """Hand student and optimizer to DeepSpeed; rank 0's weights go to every rank."""
        library = ready(self.world)
        options = derive(self.cfg)
        self.files["deepspeed.json"] = json.dumps(options, indent=2, sort_keys=True) + "\n"
        if self.cfg.precision in AUTOCAST:
            _inside_autocast(module, super().autocast)
        engine, *_ = library.initialize(
            model=module, optimizer=self.optimizer, config=options, dist_init_required=False
        )
        self.zero: Any = engine.optimizer if self.cfg.zero_stage else None
        self._flats = flats(self.zero, self.cfg.zero_stage)
        self._pieces = self._find()
        return engine

    def _find(self) -> dict[str, Piece]:
        """Where this rank's part of each trained parameter lies in the flat partitions."""
        if self.zero is None:
            return {}
        name_of = {id(parameter): name for name, parameter in self.trained.items()}
        find = whole_weights if self.cfg.zero_stage < 3 else sharded_weights
        return {name_of[id(p)]: piece for p, piece in find(self.zero, self.world.rank, self.world.world)}

    def make_moments(self) -> None:
        """Zeros for each flat partition; DeepSpeed would make them in the first update, after a load."""
        if self.zero is None:
            super().make_moments()
            return
        slots = getattr(self.optimizer, "slots", ("step", "exp_avg", "exp_avg_sq"))
        for flat in self._flats:
            for slot in slots:
                empty = torch.zeros((), device=flat.device) if slot == "step" else torch.zeros_like(flat).detach()
                self.optimizer.state[flat][slot] = empty

    # ------------------------------------------------------------------------------------------ the step

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing out here: DeepSpeed switches off what surrounds it, so the student's forward carries it."""
        return nullcontext()

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Tell DeepSpeed which backward is the last one."""
        self.module.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        yield

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's backward, without its division by the number of micro-batches."""
        self.module.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def infer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Predict, then free what stage 3 keeps gathered for reuse: it would answer after the weights have changed."""
        answer = self.module(batch)
        if self.cfg.zero_stage == 3:
            self.module.empty_partition_cache()  # type: ignore[operator]
        return answer

    def gradients(self) -> list[Tensor]:
        """This rank's partition of the averaged gradient."""
        if self.zero is None:
            return super().gradients()
        if self.cfg.offload:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # they are still on their way to the host
            return [flat.grad for flat in self._flats if flat.grad is not None]
        return [gradient for part in self.zero.averaged_gradients.values() for gradient in part]

    def over_shards(self, total: Tensor) -> Tensor:
        """Sum over ranks when each holds a partition."""
        total = total.to(self.world.device)
        return self.world.sum(total) if self.zero is not None else total

    def update(self, gradients: list[Tensor], factor: Tensor | None, found: Tensor) -> None:
        """Scale the partitions, then DeepSpeed's step.

        The optimizer is ours and skips on found_inf as under every engine. DeepSpeed also looks for numbers that
        are not finite; it does so on the host, and drops such a step whole before the optimizer is asked.
        """
        if self.cfg.offload:  # the optimizer would fetch it from the device without waiting for it
            factor, found = factor if factor is None else factor.cpu(), found.cpu()
        if not self.skips_on_device and bool(found):
            torch._foreach_mul_(gradients, float("nan"))  # DeepSpeed then drops the step
        elif factor is not None:
            torch._foreach_mul_(gradients, factor)
        if self.skips_on_device:
            self.optimizer.found_inf = found  # type: ignore[attr-defined]
        self.module.step()  # type: ignore[operator]

    def clear(self) -> None:
        """DeepSpeed's step has dropped its partitions; what is left are the student's own."""
        self.student.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------ state

    def masters(self) -> Mapping[str, Tensor]:
        """The flat fp32 partitions of this rank."""
        if self.zero is None:
            return super().masters()
        return {str(index): flat for index, flat in enumerate(self._flats)}

    @torch.no_grad()
    def published(self) -> None:
        """Copy masters into the student's weights, as DeepSpeed does at the end of an update."""
        if self.zero is None:
            return
        if self.cfg.zero_stage < 3:
            self.zero.update_lp_params()
            return
        kept = self.zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
        for shard, flat in zip(self.zero.fp16_partitioned_groups_flat, self._flats, strict=True):
            shard.data.copy_(flat.data)
        if kept:
            kept[0].all_gather(kept)

    def weight(self, name: str) -> Tensor:
        """This rank's stretch of a parameter; the parameter itself where it is whole on every rank."""
        if self.zero is None:
            return super().weight(name)
        if name in self.trained:
            return self._stretch(name, self._flats)
        parameter: Any = self.parameters[name]
        if self.cfg.zero_stage < 3:
            return parameter.detach()
        return Stretch.nth(parameter.ds_tensor, parameter.ds_shape, self.world.rank)

    def moments(self, name: str) -> dict[str, Tensor]:
        """This rank's stretch of a parameter's moments. The count of steps is its partition's, and a copy."""
        if self.zero is None:
            return super().moments(name)
        states = [self.optimizer.state[flat] for flat in self._flats]
        return {
            slot: value.clone() if slot == "step" else self._stretch(name, [state[slot] for state in states])
            for slot, value in states[0].items()
        }

    def mean(self, name: str) -> Tensor:
        """This rank's stretch of a parameter's average."""
        if self.zero is None:
            return super().mean(name)
        return self._stretch(name, list(self.average.values()))

    def take(self, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        """As everywhere; then one count of steps for all."""
        if self.zero is not None:
            count = self._count_of_steps(given)
            for flat in self._flats:
                self.optimizer.state[flat]["step"].fill_(count)
        super().take(own, given)

    def _count_of_steps(self, given: dict[str, Tensor]) -> float:
        steps = (key for key in given if key.startswith("optim.") and key.endswith(".step"))
        counts = {key: float(given[key]) for key in steps}
        few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[few] != counts[many]:
            raise ValueError(
                f"{few} is {counts[few]:g} but {many} is {counts[many]:g}: DeepSpeed keeps one count for all; "
                "continue with another engine"
            )
        return counts[few]

    def _stretch(self, name: str, flats: list[Tensor]) -> Stretch:
        """What the flat partitions, or numbers that lie as they do, hold of a parameter."""
        shape = _shape(self.trained[name])
        piece = self._pieces.get(name, NOTHING)
        return Stretch(flats[piece.flat].detach().narrow(0, piece.offset, piece.count), shape, piece.start)


# ---------------------------------------------------------------------------------------------------- its insides


def ready(world: World) -> Any:
    """The library, joined to our process group, without a search for MPI and without compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    alone = {"RANK": world.rank, "WORLD_SIZE": world.world, "LOCAL_RANK": world.local_rank}
    for key, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}).items():
        os.environ.setdefault(key, str(value))
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "engine.name", "deepspeed", f"the package is not usable here: {error}", "pip install deepspeed, or use fsdp"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # DeepSpeed would compile an all-reduce through shared memory (a minute, a C++ compiler); gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if world.device.type == "cpu" else "nccl", verbose=False)
    return deepspeed


def flats(zero: Any, stage: int) -> list[Tensor]:
    """This rank's flat fp32 partitions, in the order of the optimizer's state."""
    if zero is None:
        return []
    return list(zero.single_partition_of_fp32_groups if stage < 3 else zero.fp32_partitioned_groups_flat)


def whole_weights(zero: Any, rank: int, world: int) -> Iterator[tuple[Tensor, Piece]]:
    """Stages 1 and 2: a group's weights are views of one tensor, of which each rank owns an equal stretch."""
    for index, (group, whole) in enumerate(zip(zero.bit16_groups, zero.bit16_groups_flat, strict=True)):
        size = whole.numel() // world
        low, high = rank * size, (rank + 1) * size
        for parameter in group:
            begin = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
            first, last = max(begin, low), min(begin + parameter.numel(), high)
            if first < last:
                yield parameter, Piece(index, first - low, first - begin, last - first)


def sharded_weights(zero: Any, rank: int, world: int) -> Iterator[tuple[Tensor, Piece]]:
    """Stage 3: each rank owns an equal stretch of every weight, the last ones perhaps padded."""
    for index, group in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = rank * size
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                yield parameter, Piece(index, offset, start, count)
            offset += size


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _inside_autocast(student: nn.Module, autocast: Any) -> None:
    forward = student.forward

    def cast(batch: dict[str, Any]) -> dict[str, Tensor]:
        with autocast():
            return forward(batch)

    student.forward = cast
