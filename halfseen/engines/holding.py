"""What an engine holds: weights, moments and averages, this rank's parts of them, and how a checkpoint sees them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halfseen import engine_config
from halfseen.config import ConfigError
from halfseen.distributed import World

from .parts import fill, local_part, whole


class Holding:
    """The part of an engine that is not the step. ``Engine`` sets what is named here."""

    cfg: engine_config.Engine
    world: World
    student: nn.Module
    parameters: dict[str, nn.Parameter]  # canonical name -> every parameter, sharded or not
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    skips_on_device: bool
    average: dict[str, Tensor]  # key of masters -> its average; empty without engine.ema
    decay: float  # of the averages in the last update
    scale: Tensor  # of the loss, fp32 []; 1 but for fp16
    growth: Tensor  # int32 []: good updates since the scale changed
    _buffers: dict[str, bool]  # name -> whether it is saved
    _swapped: bool

    # ------------------------------------------------------------------------------------------ hooks

    def masters(self) -> Mapping[str, Tensor]:
        """The fp32 weights that the optimizer updates, as this rank holds them; averages follow these."""
        return self.trained

    def published(self) -> None:
        """The masters were changed by other means than an update: the student must see them."""

    def weight(self, name: str) -> Tensor:
        """A parameter of the student, as ``state`` shows it."""
        return self.parameters[name].detach()

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state of a trained parameter by slot."""
        return self.optimizer.state[self.trained[name]]

    def mean(self, name: str) -> Tensor:
        """The average of a trained parameter."""
        return self.average[name]

    def take(self, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        """Take over a state whose keys are those of ``own``, which is this engine's."""
        for key, value in own.items():
            fill(value, given[key])
        self.published()

    # ------------------------------------------------------------------------------------------ averages

    def _average(self, found: Tensor, position: int) -> None:
        if not self.average:
            return
        self.decay = self.cfg.ema_decay(position)
        weight = (1.0 - self.decay) * (1.0 - found)
        averages = [local_part(average) for average in self.average.values()]
        current = [local_part(master) for master in self.masters().values()]
        weight = weight.to(averages[0].device)  # the host's where engine.offload keeps them there
        torch._foreach_lerp_(averages, current, [weight] * len(averages))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are the averaged ones (the plain ones when engine.ema=0 keeps none)."""
        self._swap()
        self._swapped = True
        try:
            yield
        finally:
            self._swap()
            self._swapped = False

    @torch.no_grad()
    def _swap(self) -> None:
        if self.cfg.offload and self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # a forward may still be fetching the weights from the host
        # Tensor by tensor, so that the extra memory is one tensor and not a second student.
        masters = self.masters()
        for name, average in self.average.items():
            here, there = local_part(masters[name]), local_part(average)
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
        self.published()

    # ------------------------------------------------------------------------------------------ checkpoint

    def state(self) -> dict[str, Tensor]:
        """Everything a run continues from, as live tensors: a DTensor or a Stretch where this rank holds a part.

        Keys: model.NAME, buffer.NAME, optim.NAME.SLOT, ema.NAME, scaler.scale, scaler.growth. Takes no message.
        """
        if self._swapped:
            raise RuntimeError("state() inside averaged(): the weights are not the ones being trained")
        state: dict[str, Tensor] = {}
        for name in self.parameters:
            state[f"model.{name}"] = self.weight(name)
        for name, buffer in self._kept_buffers():
            state[f"buffer.{name}"] = buffer
        for name in self.trained:
            for slot, value in self.moments(name).items():
                state[f"optim.{name}.{slot}"] = value
        for name in self.trained if self.average else ():
            state[f"ema.{name}"] = self.mean(name)
        return state | {"scaler.scale": self.scale, "scaler.growth": self.growth}

    @torch.no_grad()
    def load_state(self, given: dict[str, Tensor]) -> None:
        """Take over a state of any engine: the same keys, tensors whole or sharded as here."""
        own = self.state()
        if own.keys() != given.keys():
            missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
            raise ValueError(f"another student's state: missing {missing[:3]}, without a place {extra[:3]}")
        self.take(own, given)

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Whole fp32 weights and saved buffers on the CPU by name; empty on ranks other than 0. Collective.

        ema: averaged weights where they are kept, which is for all that trains.
        """
        if ema and not self.average:
            raise ConfigError(
                "engine.ema", 0.0, "this run keeps no averaged weights", "train with e.g. engine.ema=0.9999"
            )
        found: dict[str, Tensor] = {}
        buffers = dict(self._kept_buffers())
        for name in (*self.parameters, *buffers):
            averaged = ema and name in self.trained
            tensor = buffers[name] if name in buffers else self.mean(name) if averaged else self.weight(name)
            tensor = whole(tensor, self.world)
            if self.world.main:
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                found[name] = tensor.cpu().clone() if tensor.device.type == "cpu" else tensor.cpu()
        return found

    def _kept_buffers(self) -> Iterator[tuple[str, Tensor]]:
        named = zip(self._buffers.items(), self.student.buffers(), strict=True)
        return ((name, buffer) for (name, saved), buffer in named if saved)

    def make_moments(self) -> None:
        """Make the optimizer's state by an update that changes nothing, so that one can be loaded."""
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        held = next((local_part(p).device for p in self.trained.values()), self.world.device)
        self.optimizer.found_inf = torch.ones((), device=held)  # type: ignore[attr-defined]
        if not self.skips_on_device:
            del self.optimizer.found_inf  # type: ignore[attr-defined]  # rates are 0 before the first step
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for slots in self.optimizer.state.values():
            for value in slots.values():
                value.zero_()
