"""The training step, written once: what all engines share, and the few hooks in which they differ."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfseen import config, engine_config, optim
from halfseen.data.hashing import mix, purpose
from halfseen.distributed import World

from .holding import Holding
from .parts import local_part
from .recompute import STATISTICS, recompute
from .student import aliases, blocks_of, refuse_precision, synchronise_batch_norm

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Dynamic loss scale for fp16: start, factor after an overflow, factor after so many good updates.
SCALE, BACKOFF, GROWTH, INTERVAL = 2.0**16, 0.5, 2.0, 2000


class Engine(Holding):
    """A student prepared for training: sharded, run and updated.

    The order of preparation is fixed: freeze (the caller does) -> recompute -> compile -> shard -> optimizer.
    Freezing later would leave gradients nobody owns; compiling must see the recomputation; sharding must see
    compiled blocks; the optimizer must own what sharding made of the weights.

    Weights are fp32; autocast surrounds the forward only. Dropout and drop path draw from (seed, position,
    rank). A subclass overrides hooks, and no more than it needs: in preparation ``place``,
    ``make_optimizer``, ``adopt`` and ``make_moments``; in the step ``forward``, ``accumulating``,
    ``backward``, ``gradients``, ``over_shards``, ``update`` and ``clear``; elsewhere ``infer``, and those of
    Holding for what it shards in its own way.
    """

    name = "base"

    def __init__(
        self,
        cfg: engine_config.Engine,
        student: nn.Module,
        optim_cfg: config.Optim,
        groups: list[optim.Group],
        world: World,
        seed: int,
    ) -> None:
        self.cfg, self.optim_cfg, self.world, self.seed = cfg, optim_cfg, world, seed
        refuse_precision(cfg.precision, world.device)
        self.student = synchronise_batch_norm(student, world).train()
        self.aliases = aliases(self.student)
        # Names are taken before anything is wrapped, so they never carry a wrapper's prefix; the order stays.
        names = [name for name, _ in self.student.named_parameters()]
        saved = self.student.state_dict(keep_vars=True).keys()
        self._buffers = {name: name in saved for name, _ in self.student.named_buffers()}
        blocks = blocks_of(self.student)
        if cfg.recompute:
            recompute(self.student, blocks, cfg)
        if cfg.compile:
            for block in blocks:
                block.compile()
        self._batch_norms = [module for module in self.student.modules() if isinstance(module, STATISTICS)]
        self.module = self.place(self.student)
        self.parameters = dict(zip(names, self.student.parameters(), strict=True))
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._refuse_other_groups(groups)
        self.optimizer = self.make_optimizer(groups)
        # torch's AdamW can skip an update on the device only when fused; halfseen's optimizers always can.
        fused = all(group.get("fused", True) for group in self.optimizer.param_groups)
        self.skips_on_device = fused or hasattr(type(self.optimizer), "found_inf")
        self.files: dict[str, str] = {}  # name -> text of files that belong into the run folder
        self.module = self.adopt(self.module)
        self.make_moments()
        self.average = {name: p.detach().clone() for name, p in self.masters().items()} if cfg.ema else {}
        self.decay = cfg.ema_decay(0)
        device = world.device
        self.scale = torch.tensor(SCALE if cfg.precision == "fp16" else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self._skips = torch.zeros(2, dtype=torch.int64, device=device)  # count, position of the first
        self.first_skipped: int | None = None  # position of the first update that the last ``skipped`` counted
        self._swapped = False

    # ------------------------------------------------------------------------------------------ hooks

    def place(self, student: nn.Module) -> nn.Module:
        """Move the student to the device and wrap it; returns the root to call."""
        raise NotImplementedError

    def make_optimizer(self, groups: list[optim.Group]) -> torch.optim.Optimizer:
        """The optimizer of what trains."""
        return optim.build(self.optim_cfg, groups, self.trained)

    def adopt(self, module: nn.Module) -> nn.Module:
        """Wrap what has to know the optimizer too; returns the root to call."""
        return module

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The student's scalars for one micro-batch."""
        with self.autocast():
            return self.module(batch)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch: gradients are exchanged between ranks in the last one only."""
        return nullcontext()

    def infer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The student's answer to a batch, as ``predict`` needs it."""
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this micro-batch's share of the loss."""
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """This rank's part of the averaged gradient; what ``update`` scales in place."""
        return [local_part(p.grad) for p in self.trained.values() if p.grad is not None]

    def over_shards(self, total: Tensor) -> Tensor:
        """Sum a scalar over ranks that hold different parts of the gradients."""
        return total

    def update(self, gradients: list[Tensor], factor: Tensor | None, found: Tensor) -> None:
        """Scale the gradients and update weights and moments, unless found holds 1."""
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        if self.skips_on_device:
            self.optimizer.found_inf = found  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(found):  # waits for the device: only an optimizer without found_inf needs that
            self.optimizer.step()

    def clear(self) -> None:
        """Drop the gradients after an update."""
        self.optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------ the step

    def step(self, micro_batches: list[dict[str, Any]], rate: float, position: int) -> dict[str, Tensor]:
        """One update from micro-batches of equal size. Collective.

        rate: the schedule's; each group multiplies it by its own scale. position: images consumed before this
        step. Returns the mean over micro-batches and ranks of every scalar of the student, and ``grad_norm``
        (of the whole gradient, before clipping), as fp32 scalars on the device; nothing here waits for the
        device. A loss or gradient that is not finite on any rank leaves weights, moments, averages and
        BatchNorm's statistics as they were, on every rank.
        """
        self._refuse_changes()
        micro_batches = self.taught(micro_batches)
        torch.manual_seed(mix(self.seed, purpose("dropout"), position, self.world.rank))
        optim.set_rate(self.optimizer, rate)
        statistics = self._statistics()
        names, local = self._accumulate(micro_batches)
        with torch.no_grad():
            gradients = self.gradients()
            norm = self._norm(gradients) / self.scale
            values, bad_loss, found = self._agree(names, local, norm)
            self.update(gradients, self._factor(norm), found)
            self._average(found, position)
            for buffer, before in statistics:
                buffer.copy_(torch.where(found > 0, before, buffer))
            if hasattr(self.student, "stepped"):  # a student with more to move than weights, e.g. a codebook
                cast(Any, self.student).stepped(found)
            self._count(found, bad_loss, position)
        self.clear()
        return values | {"grad_norm": norm}

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that a forward in training changes, each with what it holds now."""
        return [(buffer, buffer.clone()) for norm in self._batch_norms for buffer in norm.buffers(False)]

    def _accumulate(self, micro_batches: list[dict[str, Any]]) -> tuple[list[str], Tensor]:
        """Forward and backward of each micro-batch: the scalars' names, and their mean here, fp32 [names]."""
        count = len(micro_batches)
        names: list[str] = []
        total: Tensor | None = None
        for index, batch in enumerate(micro_batches):
            with self.accumulating(last=index == count - 1):
                scalars = self.forward(batch)
                loss = scalars["loss"].float()
                self.backward((loss * self.scale if self.cfg.precision == "fp16" else loss) / count)
            names = list(scalars)
            values = torch.stack([scalars[name].detach().float() for name in names])
            total = values if total is None else total + values
        if total is None:
            raise ValueError("a step needs at least one micro-batch")
        return names, total / count

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of the whole gradient over all ranks, fp32."""
        if not gradients:
            raise RuntimeError("no parameter received a gradient: the loss does not depend on what trains")
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        return self.over_shards(norms.square().sum()).sqrt()

    def _agree(self, names: list[str], local: Tensor, norm: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Scalars averaged over ranks, whether the loss is bad, and 1.0 where the update must be skipped.

        One collective carries both, so every rank decides from the same numbers.
        """
        message = torch.cat([local, (~norm.isfinite()).float()[None]])
        message = self.world.sum(message) / self.world.world if self.world.world > 1 else message
        values = dict(zip(names, message.unbind()))
        bad_loss = ~values["loss"].isfinite()
        return values, bad_loss, (bad_loss | ~(message[-1] == 0)).float()

    def _factor(self, norm: Tensor) -> Tensor | None:
        """What gradients are multiplied by: clipping and the inverse loss scale, in one pass."""
        clip = self.optim_cfg.clip
        factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else None
        if self.cfg.precision != "fp16":
            return factor
        return (factor if factor is not None else 1.0) / self.scale

    def _count(self, found: Tensor, bad_loss: Tensor, position: int) -> None:
        """Count a skipped update, and adapt the loss scale.

        Under fp16 an overflow with a finite loss is how the scale is found, and counts only when the scale
        has nowhere left to go.
        """
        counted = found > 0
        if self.cfg.precision == "fp16":
            counted = counted & (bad_loss | (self.scale < 1.0))
            torch._amp_update_scale_(self.scale, self.growth, found, GROWTH, BACKOFF, INTERVAL)
        first = counted & (self._skips[0] == 0)
        self._skips[1] = torch.where(first, position, self._skips[1])
        self._skips[0] += counted

    def autocast(self) -> AbstractContextManager[Any]:
        """Surrounds a forward; weights stay fp32.

        Without autocast's cache: from there all uses of a shared weight would take one cast copy, and its gradients
        would be summed in that copy's type instead of fp32. A weight used once is cast once either way.
        """
        dtype = AUTOCAST.get(self.cfg.precision)
        return torch.autocast(self.world.device.type, dtype, cache_enabled=False) if dtype else nullcontext()

    # ------------------------------------------------------------------------------------------ questions

    def skipped(self) -> int:
        """Updates skipped since the last call, the same on every rank; waits for the device."""
        count, first = self._skips.tolist()
        self._skips.zero_()
        self.first_skipped = first if count else None
        return count

    def hyperparameters(self) -> dict[str, float]:
        """What a monitor shows beside the scalars: current rate, strongest decay, decay of the averages."""
        groups = self.optimizer.param_groups
        shown = {
            "lr": max(group["lr"] / group["lr_scale"] for group in groups if group["lr_scale"]),
            "weight_decay": max(group["weight_decay"] for group in groups),
        }
        return shown | ({"ema_decay": self.decay} if self.cfg.ema else {})

    def norms(self, batch: dict[str, Any], scalars: Sequence[str]) -> dict[str, Tensor]:
        """Norm of the gradient that each of the student's scalars has by itself. Collective; nothing is updated.

        Costs a forward and a backward for each. Of the gradient averaged over ranks, not clipped, fp32.
        """
        self._refuse_changes()
        (batch,) = self.taught([batch])
        statistics = self._statistics()
        found = {name: self._norm_of(batch, name) for name in scalars}
        for buffer, before in statistics:
            buffer.copy_(before)
        return found

    def _norm_of(self, batch: dict[str, Any], name: str) -> Tensor:
        torch.manual_seed(mix(self.seed, purpose("dropout"), 0, self.world.rank))  # alike for every scalar
        with self.accumulating(last=True):
            seen = self.forward(batch)
            # Weights that this scalar does not reach get zeros: engines wait for the gradient of each.
            self.backward((seen[name].float() + 0.0 * seen["loss"].float()) * self.scale)
        with torch.no_grad():
            gradients = self.gradients()
            norm = self._norm(gradients) / self.scale
            self.update(gradients, None, torch.ones((), device=self.world.device))  # which changes nothing
        self.clear()
        return norm

    @torch.no_grad()
    def predict(self, batch: dict[str, Any], task: str = "predict") -> dict[str, Tensor]:
        """The student's answer to ``batch | {"task": task}``, in eval mode. Collective when sharded."""
        training = self.module.training
        self.module.eval()
        try:
            with self.autocast():
                return self.infer(batch | {"task": task})
        finally:
            self.module.train(training)

    def taught(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches with what the averaged student answers to task="teach". Collective.

        Only for a student with ``learns_from_average`` (data2vec); others get their batches back. A step begins with
        this: all its micro-batches are there then on all ranks, and the averages are those of the update before.
        """
        if not getattr(self.student, "learns_from_average", False):
            return micro_batches
        with self.averaged():
            return [batch | self.predict(batch, "teach") for batch in micro_batches]

    # ------------------------------------------------------------------------------------------ refusals

    def _refuse_other_groups(self, groups: list[optim.Group]) -> None:
        grouped = [name for group in groups for name in group.names]
        odd = sorted(set(grouped) ^ self.trained.keys()) or sorted({n for n in grouped if grouped.count(n) > 1})
        if odd:
            raise ValueError(f"parameter groups and trainable parameters differ: {odd[:3]}; freeze before grouping")

    def _refuse_changes(self) -> None:
        if self._swapped:
            raise RuntimeError("step() inside averaged(): the weights are not the ones being trained")
        for name, parameter in self.parameters.items():
            if parameter.requires_grad != (name in self.trained):
                raise RuntimeError(
                    f"requires_grad of {name} changed after the engine was made: freeze before "
                    "engines.create, or make a new engine"
                )
