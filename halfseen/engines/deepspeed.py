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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from halfseen import config
from halfseen.config import ConfigError
from halfseen.distributed import World, one_process_group

from .base import AUTOCAST, Engine, batched

# Sections of DeepSpeed's JSON that would do what halfseen already does, or change what its partitions mean.
OURS = (
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "communication_data_type",
    "data_types",
    "checkpoint",
    "compile",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zenflow",
)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of a flattened parameter lie in flat number ``flat`` from ``offset`` on."""

    flat: int
    offset: int
    start: int
    count: int


class DeepSpeed(Engine):
    """One class for all stages: 0 is plain replication, 1 shards moments, 2 gradients too, 3 weights too."""

    name = "deepspeed"
    _collected: dict[tuple[str, str], Tensor] = {}  # while ``state`` runs: what it has put together already

    # ------------------------------------------------------------------------------------------ preparation

    def place(self, student: nn.Module) -> nn.Module:
        """Move the student to the device; DeepSpeed takes it over once there is an optimizer."""
        one_process_group(self.world)
        self._mesh = init_device_mesh(self.world.device.type, (self.world.world,), mesh_dim_names=("shard",))
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

    def _find(self) -> dict[str, list[Piece]]:
        """Where this rank's part of each trained parameter lies in the flat partitions."""
        if self.zero is None:
            return {}
        name_of = {id(parameter): name for name, parameter in self.trained.items()}
        find = whole_weights if self.cfg.zero_stage < 3 else sharded_weights
        found: dict[str, list[Piece]] = {name: [] for name in self.trained}
        for parameter, piece in find(self.zero, self.world.rank, self.world.world):
            found[name_of[id(parameter)]].append(piece)
        return found

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
        if not self.skips_on_device and bool(found):
            torch._foreach_mul_(gradients, float("nan"))  # DeepSpeed then drops the step
        elif factor is not None:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
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

    def state(self) -> dict[str, Tensor]:
        """As everywhere; what is partitioned comes in a few large messages instead of one for each tensor."""
        self._collected = dict(self._collect(self._partitioned(), list(self.trained))) if self.zero else {}
        try:
            return super().state()
        finally:
            self._collected = {}

    def weight(self, name: str) -> Tensor:
        """A parameter cut along its first axis; itself where it is whole on every rank. Collective."""
        if self.zero is None:
            return super().weight(name)
        if name in self.trained:
            return self._read("model", name)
        parameter = self.parameters[name]
        return self._cut(_gathered(parameter, self.world)) if self.cfg.zero_stage == 3 else parameter.detach()

    def moments(self, name: str) -> dict[str, Tensor]:
        """A parameter's moments, cut like it; the step count is its partition's. Collective."""
        if self.zero is None:
            return super().moments(name)
        first = self.optimizer.state[self._flats[0]]
        return {slot: first[slot] if slot == "step" else self._read(f"optim.{slot}", name) for slot in first}

    def mean(self, name: str) -> Tensor:
        """A parameter's average, cut like it. Collective."""
        if self.zero is None:
            return super().mean(name)
        return self._read("ema", name)

    @torch.no_grad()
    def take(self, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        """Write every key into the partition that holds it. Collective."""
        if self.zero is None:
            super().take(own, given)
            return
        partitioned = self._partitioned()
        counts = [self.optimizer.state[flat]["step"] for flat in self._flats]
        self._refuse_uneven_steps(given)
        for key in own:
            section, name = key.split(".", 1)
            slot = ""
            if section == "optim":
                name, slot = name.rsplit(".", 1)
            value = given[key]
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if slot == "step":
                for count in counts:
                    count.copy_(value)
            elif section in ("model", "ema", "optim") and name in self.trained:
                self._write(partitioned[f"optim.{slot}" if slot else section], name, value)
            elif section == "model" and self.cfg.zero_stage == 3:
                _put(self.parameters[name], value, self.world.rank)
            else:
                own[key].copy_(value)
        self.published()

    def _refuse_uneven_steps(self, given: dict[str, Tensor]) -> None:
        steps = (key for key in given if key.startswith("optim.") and key.endswith(".step"))
        counts = {key: float(given[key]) for key in steps}
        if len(set(counts.values())) > 1:
            few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            raise ValueError(
                f"{few} is {counts[few]:g} but {many} is {counts[many]:g}: DeepSpeed keeps one count for all; "
                "continue with another engine"
            )

    def _partitioned(self) -> dict[str, list[Tensor]]:
        """What lies in flat partitions like the weights: weights, averages, and moments by slot."""
        states = [self.optimizer.state[flat] for flat in self._flats]
        moments = {f"optim.{slot}": [state[slot] for state in states] for slot in states[0] if slot != "step"}
        averages = {"ema": list(self.average.values())} if self.average else {}
        return {"model": list(self._flats)} | averages | moments

    def _read(self, kind: str, name: str) -> Tensor:
        """This rank's cut of a parameter, or of what is partitioned like it. Collective."""
        if (kind, name) in self._collected:
            return self._collected[kind, name]
        return next(self._collect({kind: self._partitioned()[kind]}, [name]))[1]

    def _collect(
        self, partitioned: dict[str, list[Tensor]], names: list[str]
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Put tensors together from the ranks' partitions, batch by batch, and keep this rank's cut of each."""
        shapes = {name: _shape(self.trained[name]) for name in names}
        sizes = {(kind, name): shapes[name].numel() for kind in partitioned for name in names}
        for batch in batched(sizes):
            whole = torch.zeros(sum(sizes[key] for key in batch), device=self.world.device)
            parts = whole.split([sizes[key] for key in batch])
            for (kind, name), part in zip(batch, parts, strict=True):
                for piece in self._pieces[name]:
                    own = partitioned[kind][piece.flat].detach().narrow(0, piece.offset, piece.count)
                    part.narrow(0, piece.start, piece.count).copy_(own)
            if self.world.world > 1:
                dist.all_reduce(whole)
            for (kind, name), part in zip(batch, parts, strict=True):
                yield (kind, name), self._cut(part.view(shapes[name]))

    def _write(self, targets: list[Tensor], name: str, whole: Tensor) -> None:
        for piece in self._pieces[name]:
            part = whole.reshape(-1).narrow(0, piece.start, piece.count)
            targets[piece.flat].data.narrow(0, piece.offset, piece.count).copy_(part)

    def _cut(self, whole: Tensor) -> Tensor:
        """This rank's rows, so that a state costs each rank its share of memory; scalars stay whole."""
        if not whole.ndim:
            return whole.clone()
        return distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None).clone()


# ---------------------------------------------------------------------------------------------------- the JSON


def refuse(cfg: config.Engine, optim_cfg: config.Optim) -> None:
    """Raise ConfigError for what ZeRO cannot do, and for an unusable file of extra options."""
    derive(cfg)
    if optim_cfg.name in ("lamb", "lars") and cfg.zero_stage:
        raise ConfigError(
            "optim.name",
            optim_cfg.name,
            f"needs each tensor's norm, and ZeRO stage {cfg.zero_stage} flattens tensors into one",
            "use engine.zero_stage=0, optim.name=adamw, or engine.name=fsdp",
        )
    if cfg.offload and not cfg.zero_stage:
        raise ConfigError(
            "engine.offload", True, "stage 0 has no partition to offload", "use engine.zero_stage=1, 2 or 3"
        )
    if cfg.compile and cfg.zero_stage == 3:
        raise ConfigError(
            "engine.compile",
            True,
            "ZeRO stage 3 gathers weights in hooks that are not tested with compiled blocks",
            "use engine.name=fsdp, engine.zero_stage=2 or engine.compile=false",
        )


def derive(cfg: config.Engine) -> dict[str, Any]:
    """DeepSpeed's options: ours, and those of the file engine.extra beside them."""
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch's linear for the whole process
    if cfg.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only its own reports use it
        "gradient_accumulation_steps": 1,  # halfseen names the last micro-batch instead
        "gradient_clipping": 0.0,  # halfseen clips, by the same norm under every engine
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return merge(ours, _extra(cfg.extra), cfg.extra) if cfg.extra else ours


def _extra(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("engine.extra", path, f"cannot be read: {error}", "name a readable JSON file") from error
    if not isinstance(found, dict):
        raise ConfigError("engine.extra", path, "is not a JSON object", "write {...} around its options")
    return found


def merge(ours: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    """Both, or ConfigError where theirs says otherwise or speaks of what is halfseen's. "auto" agrees with all."""
    merged = dict(ours)
    for key, value in theirs.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = merge(ours[key], value, path, f"{full}.")
        elif key in ours and value in ("auto", ours[key]):
            continue
        elif key in ours:
            raise ConfigError(
                "engine.extra", path, f"{full} is {value!r}, but halfseen sets {ours[key]!r}", f"remove {full} from it"
            )
        elif full in OURS:
            raise ConfigError("engine.extra", path, f"{full} is halfseen's to decide", f"remove {full} from it")
        else:
            merged[key] = value
    return merged


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


def _gathered(parameter: Any, world: World) -> Tensor:
    """A weight of stage 3 that no partition of the optimizer holds, whole."""
    shard = parameter.ds_tensor.detach()
    stretches = [torch.empty_like(shard) for _ in range(world.world)]
    dist.all_gather(stretches, shard.contiguous())
    return torch.cat(stretches)[: parameter.ds_numel].view(parameter.ds_shape)


def _put(parameter: Any, whole: Tensor, rank: int) -> None:
    """Write this rank's stretch of such a weight; ``published`` gathers it anew where it stays gathered."""
    size = parameter.partition_numel()
    stretch = whole.reshape(-1)[rank * size : (rank + 1) * size]
    parameter.ds_tensor.data.narrow(0, 0, stretch.numel()).copy_(stretch)


def _inside_autocast(student: nn.Module, autocast: Any) -> None:
    forward = student.forward

    def cast(batch: dict[str, Any]) -> dict[str, Tensor]:
        with autocast():
            return forward(batch)

    student.forward = cast
