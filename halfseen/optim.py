"""Optimizers, parameter groups and learning-rate schedules, all addressed by parameter name."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halfseen import config

# ------------------------------------------------------------------------------------------------- groups

TOKENS = ("cls_token", "dist_token", "reg_token", "mask_token", "pos_embed")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(patch_embed|norm_pre|cls_token|dist_token|reg_token|mask_token|pos_embed)\b")


@dataclass
class Group:
    """Parameters that share a rate and a decay, by canonical name."""

    name: str
    names: list[str] = field(default_factory=list)
    lr_scale: float = 1.0  # this group's rate over the schedule's
    weight_decay: float = 0.0


def trunk_layers(depth: int, rule: Literal["mae", "timm"] = "mae") -> Callable[[str], int]:
    """Layer of each parameter, for layer-wise decay: embeddings 0, block i i+1, everything else depth+1.

    All branches of a parallel block are one layer. ``mae`` (also BEiT, SimMIM) counts the final norm to
    everything else, ``timm`` to the last block. The number of layers to give to ``groups`` is depth+1.
    """

    def layer_of(name: str) -> int:
        trunk = name.removeprefix("encoder.")
        if block := _BLOCK.match(trunk):
            return int(block[1]) + 1
        if _EMBEDDING.match(trunk):
            return 0
        return depth if rule == "timm" and trunk.startswith("norm.") else depth + 1

    return layer_of


def groups(
    student: nn.Module,
    cfg: config.Optim,
    layer_of: Callable[[str], int] | None = None,
    layers: int = 0,
    exempt: Collection[str] | None = None,
) -> list[Group]:
    """Every trainable parameter once (a tied one under its first name), grouped by layer and by decay.

    layer_of: name -> 0..layers, whose rate is cfg.layer_decay ** (layers - layer); None: one layer.
    Not decayed: tensors with fewer than two axes, biases, and the parameters whose own name (after the last
    dot) is in exempt, which by default is cfg.no_decay, and TOKENS unless cfg.decay_tokens.
    """
    exempt = (*cfg.no_decay, *(() if cfg.decay_tokens else TOKENS)) if exempt is None else exempt
    found: dict[tuple[int, bool], Group] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        own_name = name.rpartition(".")[2]
        decayed = parameter.ndim > 1 and own_name != "bias" and own_name not in exempt
        layer = layer_of(name) if layer_of else layers
        if not 0 <= layer <= layers:
            raise ValueError(f"layer {layer} of {name} is not within 0..{layers}")
        if (layer, decayed) not in found:
            title = "decay" if decayed else "no_decay"
            found[layer, decayed] = Group(
                f"layer_{layer}.{title}" if layer_of else title,
                lr_scale=cfg.layer_decay ** (layers - layer),
                weight_decay=cfg.weight_decay if decayed else 0.0,
            )
        found[layer, decayed].names.append(name)
    if not found:
        raise ValueError("the student has no trainable parameter")
    return [found[key] for key in sorted(found)]


# ------------------------------------------------------------------------------------------------- optimizers


def build(cfg: config.Optim, groups: Iterable[Group], parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over parameters[name] for each name of each group.

    Every param_group keeps the group's fields; the rate is 0 until ``set_rate``. All optimizers skip an
    update on the device, leaving weights and moments as they are, when their attribute ``found_inf`` is a
    tensor holding 1.
    """
    listed: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "name": group.name,
            "names": list(group.names),
            "lr_scale": group.lr_scale,
            "weight_decay": group.weight_decay,
            "lr": 0.0,
        }
        for group in groups
    ]
    if cfg.name == "lamb":
        # The published variant clips the global norm at 1 itself; the engine's optim.clip replaces that.
        eps = 1e-6 if cfg.eps is None else cfg.eps
        return LAMB(listed, betas=cfg.betas, eps=eps, max_norm=None if cfg.clip else 1.0)
    if cfg.name == "lars":
        return LARS(listed, momentum=cfg.momentum)
    if cfg.name == "sgd":
        return LARS(listed, momentum=cfg.momentum, trust=None)
    devices = {parameter.device.type for parameter in parameters.values()}
    fused = devices in ({"cpu"}, {"cuda"}) and all(p.is_floating_point() for p in parameters.values())
    eps = 1e-8 if cfg.eps is None else cfg.eps
    return torch.optim.AdamW(listed, betas=cfg.betas, eps=eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: the schedule's times the group's lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _norms(tensors: list[Tensor]) -> Tensor:
    """L2 norm of each whole tensor, fp32 [len(tensors)]; sharded tensors are summed over their shards."""
    local = [_local(tensor) for tensor in tensors]
    squares = torch.stack(torch._foreach_norm(local, 2, torch.float32)).square()
    meshes: dict[tuple[Any, Any], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            meshes.setdefault((tensor.device_mesh, tensor.placements), []).append(index)
    found = list(squares.unbind())  # a list as an index would be copied to the device, with a wait for it
    for (mesh, placements), indices in meshes.items():
        part = torch.stack([found[index] for index in indices])
        for axis, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(part, group=mesh.get_group(axis))
        for index, square in zip(indices, part.unbind()):
            found[index] = square
    return torch.stack(found).sqrt()


class _Named(torch.optim.Optimizer):
    """What our own optimizers share: named state tensors, and skipping an update on the device."""

    found_inf: Tensor | None = None
    # State tensors of each parameter: "step" is a scalar, the others have the parameter's shape.
    slots: tuple[str, ...] = ()

    def _ready(self, group: dict[str, Any]) -> list[nn.Parameter]:
        """The group's parameters that have a gradient, with their state made."""
        ready = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in ready:
            state = self.state[parameter]
            for slot in self.slots if not state else ():
                if slot == "step":
                    state[slot] = torch.zeros((), device=parameter.device)
                else:
                    state[slot] = torch.zeros_like(parameter)
        return ready

    def _keep(self) -> Tensor | float:
        """1 to update, 0 to skip; a device tensor when skipping is possible at all."""
        return 1.0 if self.found_inf is None else (self.found_inf == 0).float().reshape(())

    def _gradients(self, ready: list[nn.Parameter], keep: Tensor | float) -> list[Tensor]:
        """Local gradients; zeros where the update is skipped, since infinity times 0 is not 0."""
        local = [_local(parameter.grad) for parameter in ready if parameter.grad is not None]
        if isinstance(keep, Tensor):
            local = [torch.where(keep > 0, gradient, torch.zeros_like(gradient)) for gradient in local]
        return local


class LAMB(_Named):
    """LAMB (You et al., 2019) in the variant of apex and timm, which DeiT III's recipes use.

    The global gradient norm is clipped at max_norm; Adam's update with bias correction plus decay * weight is
    scaled by |weight| / |update|, except in groups without decay and where a norm is 0.
    """

    slots = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_norm: float | None = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_norm = max_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; no closure."""
        keep = self._keep()
        every = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        shrink: Tensor | None = None
        if self.max_norm is not None and every:
            shrink = self.max_norm / torch.linalg.vector_norm(_norms(every)).clamp(min=self.max_norm)
        for group in self.param_groups:
            if ready := self._ready(group):
                self._update(group, ready, shrink, keep)

    def _update(
        self, group: dict[str, Any], ready: list[nn.Parameter], shrink: Tensor | None, keep: Tensor | float
    ) -> None:
        beta1, beta2 = group["betas"]
        gradients = self._gradients(ready, keep)
        if shrink is not None:
            gradients = list(torch._foreach_mul(gradients, torch.nan_to_num(shrink)))
        mean = [_local(self.state[p]["exp_avg"]) for p in ready]
        square = [_local(self.state[p]["exp_avg_sq"]) for p in ready]
        steps = [self.state[p]["step"] for p in ready]
        # A list of tensors: a single tensor would be read as a number, on the host.
        torch._foreach_add_(steps, [keep] * len(steps) if isinstance(keep, Tensor) else keep)
        torch._foreach_mul_(mean, 1 - (1 - beta1) * keep)
        torch._foreach_add_(mean, gradients, alpha=1 - beta1)
        torch._foreach_mul_(square, 1 - (1 - beta2) * keep)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
        # A first update that is skipped leaves step at 0; its moments must not be divided by 0.
        counts = torch._foreach_clamp_min(steps, 1.0)
        update = list(torch._foreach_div(mean, _one_minus_power(beta1, counts)))
        scale = torch._foreach_div(square, _one_minus_power(beta2, counts))
        scale = torch._foreach_sqrt(scale)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(update, scale)
        weights = [_local(p) for p in ready]
        if group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
            trust = _trust(_norms(list(ready)), _norms([_like(u, p) for u, p in zip(update, ready)]))
            torch._foreach_mul_(update, list(trust.unbind()))
        torch._foreach_mul_(update, keep)
        torch._foreach_add_(weights, update, alpha=-group["lr"])


def _one_minus_power(beta: float, counts: Iterable[Tensor]) -> list[Tensor]:
    """1 - beta ** count of each count: what Adam's moments are divided by."""
    powers = list(torch._foreach_pow(beta, list(counts)))
    torch._foreach_neg_(powers)
    torch._foreach_add_(powers, 1.0)
    return powers


class LARS(_Named):
    """SGD with momentum, and LARS (You et al., 2017) as MAE's and MoCo v3's linear probes use it.

    With trust, tensors with two or more axes take decay and the rate trust * |weight| / |gradient|; the
    others take neither. trust=None is plain SGD with the group's decay.
    """

    slots = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float | None = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.trust = trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; no closure."""
        keep = self._keep()
        for group in self.param_groups:
            ready = self._ready(group)
            adapted = [p for p in ready if p.ndim > 1 and self.trust is not None]
            plain = [p for p in ready if p.ndim < 2 or self.trust is None]
            if adapted:
                self._update(group, adapted, keep, adapted=True)
            if plain:
                self._update(group, plain, keep, adapted=False)

    def _update(self, group: dict[str, Any], chosen: list[nn.Parameter], keep: Tensor | float, adapted: bool) -> None:
        gradients = self._gradients(chosen, keep)
        weights = [_local(p) for p in chosen]
        if group["weight_decay"] and (adapted or self.trust is None):
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if adapted and self.trust is not None:
            ratio = _trust(_norms(list(chosen)), _norms([_like(g, p) for g, p in zip(gradients, chosen)]), self.trust)
            gradients = list(torch._foreach_mul(gradients, list(ratio.unbind())))
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in chosen]
        torch._foreach_mul_(buffers, 1 - (1 - group["momentum"]) * keep)
        torch._foreach_add_(buffers, torch._foreach_mul(gradients, keep))
        torch._foreach_add_(weights, torch._foreach_mul(buffers, keep), alpha=-group["lr"])


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor seen as sharded the way the parameter is, so that its norm is the whole tensor's."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _trust(weights: Tensor, updates: Tensor, coefficient: float = 1.0) -> Tensor:
    """coefficient * |weight| / |update|, or 1 where either is 0."""
    return torch.where((weights > 0) & (updates > 0), coefficient * weights / updates, torch.ones_like(weights))


# ------------------------------------------------------------------------------------------------- schedules


def cosine(
    time: float, peak: float, *, total: float, warmup: float = 0.0, start: float = 0.0, floor: float = 0.0
) -> float:
    """Linear from start to peak over warmup, half a cosine to floor at total, then floor (MAE's form)."""
    if time < warmup:
        return start + (peak - start) * time / warmup
    progress = min((time - warmup) / (total - warmup), 1.0) if total > warmup else 1.0
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def timm_cosine(
    time: float,
    peak: float,
    *,
    length: float,
    warmup: float = 0.0,
    start: float = 0.0,
    floor: float = 0.0,
    prefix: bool = False,
    cycles: int = 1,
    cycle_decay: float = 1.0,
    cycle_stretch: float = 1.0,
    k_decay: float = 1.0,
) -> float:
    """timm's cosine, which DeiT's recipes use: the warm-up overwrites the first part of a cosine over length.

    The rate therefore drops from the peak onto that cosine when the warm-up ends. With prefix the cosine
    begins after the warm-up and the whole takes warmup + length. time, length and warmup share one unit.
    cycles: restarts; each one's peak is cycle_decay, its length cycle_stretch, times the one before.
    """
    if time < warmup:
        return start + time * ((peak - start) / warmup)
    time -= warmup if prefix else 0
    cycle = 0
    while time >= length and cycle < cycles:
        time, length, cycle = time - length, length * cycle_stretch, cycle + 1
    if cycle >= cycles:
        return floor
    peak *= cycle_decay**cycle
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * time**k_decay / length**k_decay))


def beit_cosine(
    step: float, peak: float, *, total: float, warmup: float = 0.0, start: float = 0.0, floor: float = 0.0
) -> float:
    """BEiT's cosine, in steps: the last step of the warm-up has the peak already, and so has the first one after it.

    The last step of all is one step of the cosine above floor.
    """
    if step < warmup:
        return start + (peak - start) * step / (warmup - 1) if warmup > 1 else start
    return cosine(step - warmup, peak, total=total - warmup, floor=floor)


@dataclass(frozen=True)
class Schedule:
    """The learning rate at every position (images consumed so far)."""

    cfg: config.Optim
    peak: float  # absolute rate after the warm-up
    warmup_images: float
    total_images: float
    step_images: float = 1.0  # images of one update; schedule=beit counts steps
    drops: tuple[float, ...] = ()  # positions from which on the rate is cfg.drop times what it was (schedule=steps)

    def rate(self, position: float) -> float:
        """The rate of the update that starts at this position."""
        cfg = self.cfg
        if cfg.schedule in ("constant", "steps"):
            ramp = min(position / self.warmup_images, 1.0) if self.warmup_images else 1.0
            passed = sum(position >= drop for drop in self.drops)
            return (cfg.warmup_lr + (self.peak - cfg.warmup_lr) * ramp) * cfg.drop**passed
        warmup, start, floor = self.warmup_images, cfg.warmup_lr, cfg.min_lr
        if cfg.schedule == "timm":
            return timm_cosine(position, self.peak, length=self.total_images, warmup=warmup, start=start, floor=floor)
        if cfg.schedule == "beit":
            now, total, ramp = (images / self.step_images for images in (position, self.total_images, warmup))
            return beit_cosine(now, self.peak, total=total, warmup=ramp, start=start, floor=floor)
        return cosine(position, self.peak, total=self.total_images, warmup=warmup, start=start, floor=floor)
