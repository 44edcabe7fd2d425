"""FairScale: moments sharded over ranks by whole parameters (OSS), under DDP or under its own ShardedDDP.

FairScale is no longer developed; what it still does right is kept here, what it does wrong without a word is guarded.
Its FullyShardedDataParallel is in fairscale_fsdp.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfseen import config, engine_config, optim
from halfseen.checkpoint.stretch import Stretch
from halfseen.config import ConfigError
from halfseen.distributed import one_process_group

from .ddp import Replicated


class FairScale(Replicated):
    """OSS: every rank holds all weights, and the moments of the parameters it owns.

    engine.fairscale=oss: torch's DDP averages gradients on every rank. engine.fairscale=sharded: ShardedDDP reduces
    each gradient to its owner only.
    """

    name = "fairscale"

    @property
    def sharded(self) -> bool:
        """Whether ShardedDDP is asked for."""
        return self.cfg.fairscale == "sharded"

    # ------------------------------------------------------------------------------------------ preparation

    def place(self, student: nn.Module) -> nn.Module:
        """DDP around the student; under ShardedDDP only the move, since that one needs the optimizer."""
        one_process_group(self.world)
        return student.to(self.world.device) if self.sharded else super().place(student)

    def make_optimizer(self, groups: list[optim.Group]) -> torch.optim.Optimizer:
        """Our optimizer's class and options, dealt out by OSS."""
        try:
            from fairscale.optim.oss import OSS
        except ImportError as error:
            raise ConfigError(
                "engine.name",
                "fairscale",
                f"the package is not usable here: {error}",
                "pip install fairscale, or use engine.name=deepspeed engine.zero_stage=1",
            ) from error
        plain = super().make_optimizer(groups)
        listed = [dict(group) for group in plain.param_groups]
        options = {key: value for key, value in plain.defaults.items() if key in _arguments(type(plain))}
        if isinstance(plain, optim.LAMB):
            options["max_norm"] = plain.max_norm
        if isinstance(plain, optim.LARS):
            options["trust"] = plain.trust
        sharded = OSS(listed, optim=type(plain), **options)
        owned = sharded.partition_parameters()
        self._owner = {id(p): rank for rank, part in enumerate(owned) for group in part for p in group["params"]}
        return sharded

    def adopt(self, module: nn.Module) -> nn.Module:
        """ShardedDDP, where asked for."""
        if not self.sharded:
            return module
        from fairscale.nn.data_parallel import ShardedDataParallel

        # The default buckets, never reduce_buffer_size=0: without them recomputed shared blocks come out wrong.
        return ShardedDataParallel(module, self.optimizer, broadcast_buffers=False, auto_refresh_trainable=False)

    def make_moments(self) -> None:
        """Moments of what this rank owns, by an update of its part that changes nothing."""
        whole, self.optimizer = self.optimizer, self._inner()
        self._part = {name: p for name, p in self.trained.items() if self._owner[id(p)] == self.world.rank}
        every, self.trained = self.trained, self._part
        super().make_moments()
        self.optimizer, self.trained = whole, every

    def _inner(self) -> Any:
        return self.optimizer.optim  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------ the step

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """no_sync in all micro-batches but the last: ShardedDDP would otherwise count gradients twice, silently."""
        with super().accumulating(last):
            yield

    def gradients(self) -> list[Tensor]:
        """Every gradient under DDP; those that this rank owns under ShardedDDP, where others are not averaged."""
        if not self.sharded:
            return super().gradients()
        own = [p.grad.detach() for p in self._part.values() if p.grad is not None]
        return own or [torch.zeros((), device=self.world.device)]

    def over_shards(self, total: Tensor) -> Tensor:
        """Sum over owners under ShardedDDP."""
        return self.world.sum(total) if self.sharded else total

    def update(self, gradients: list[Tensor], factor: Tensor | None, found: Tensor) -> None:
        """Scale gradients, update what this rank owns, and broadcast it."""
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        if self.skips_on_device:
            self._inner().found_inf = found
            self.optimizer.step()
        elif not bool(found):
            self.optimizer.step()

    def clear(self) -> None:
        """ShardedDDP's gradients are views of its buckets and must stay, zeroed.

        An ordinary zero_grad sets them to None; from then on buckets and gradients are different memory, and every
        later step is wrong without a word.
        """
        if self.sharded:
            self.module.zero_grad()
        else:
            super().clear()

    # ------------------------------------------------------------------------------------------ state

    def moments(self, name: str) -> dict[str, Tensor]:
        """The moments where this rank owns them, and nothing of them elsewhere."""
        parameter = self.trained[name]
        found: dict[str, Tensor] = {}
        for slot in self._slots():
            shape = torch.Size() if slot == "step" else parameter.shape
            own = self._inner().state[parameter][slot] if name in self._part else parameter.new_empty(0)
            found[slot] = Stretch(own, shape, 0)
        return found

    def _slots(self) -> tuple[str, ...]:
        return getattr(self._inner(), "slots", ("step", "exp_avg", "exp_avg_sq"))


def _arguments(kind: type[torch.optim.Optimizer]) -> set[str]:
    import inspect

    return set(inspect.signature(kind).parameters)


def refuse(cfg: engine_config.Engine, optim_cfg: config.Optim) -> None:
    """Raise ConfigError for what FairScale cannot do."""
    if optim_cfg.name == "lamb" and optim_cfg.clip is None:
        raise ConfigError(
            "optim.name",
            "lamb",
            "clips by the norm of the whole gradient, of which each rank's optimizer sees a part",
            "set optim.clip=1.0 (the engine clips by the whole norm), or use engine.name=ddp or fsdp",
        )
    if cfg.fairscale != "full":
        return
    if cfg.device == "cpu":
        reason = "FairScale's FullyShardedDataParallel needs CUDA streams, and this run is on the CPU"
        raise ConfigError("engine.fairscale", "full", reason, "use engine.name=fsdp, or engine.fairscale=sharded")
    if optim_cfg.name in ("lamb", "lars"):
        reason = "needs each tensor's norm, and FairScale cuts tensors into stretches"
        raise ConfigError("optim.name", optim_cfg.name, reason, "use optim.name=adamw, or engine.name=fsdp")
    if cfg.compile:
        reason = "FairScale gathers weights in hooks that are not tested with compiled blocks"
        raise ConfigError("engine.compile", True, reason, "use engine.name=fsdp, or engine.compile=false")
