"""A device that is nowhere: its tensors have shapes, types and a place, and no numbers.

What a training step would do on a GPU can so be watched without one: an operator that mixes tensors of the device
and of the host is refused, and what makes the host wait for the device is written down. A number that is asked of
the device raises, since there is none.
"""

import contextlib
import traceback
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A type that torch knows and nobody has: autograd runs its backward on the calling thread, as the CPU's.
DEVICE = torch.device("lazy:0")

_SHAPES = FakeTensorMode(allow_non_fake_inputs=True)
_AUTOCAST, _AUTOCASTS, _ATTENTION = torch.autocast, torch.is_autocast_enabled, F.scaled_dot_product_attention


class Elsewhere(TorchDispatchMode):
    """Inside, DEVICE exists. ``waits``: what would have made the host wait for a GPU, and where in halfseen."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.unfused: list[str] = []  # attention masks that no fused kernel of a GPU takes
        self.entered = contextlib.ExitStack()

    def __enter__(self):
        """Let modules, autocast and attention know the device."""
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) shows its copy
        self.entered.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        for place, name, stand_in in (
            (nn.Module, "to", moved),
            (torch, "autocast", Autocast),
            (torch, "is_autocast_enabled", lambda *kind: kind != (DEVICE.type,) and _AUTOCASTS(*kind)),
            (F, "scaled_dot_product_attention", self.attention),
        ):
            self.entered.enter_context(mock.patch.object(place, name, stand_in))
        real = mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda mode: True))
        self.entered.enter_context(real)  # also where there is a GPU
        return super().__enter__()

    def __exit__(self, *error):
        """Forget it again."""
        super().__exit__(*error)
        self.entered.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note what waits; make what is to be on the device without numbers."""
        kwargs = kwargs or {}
        if wait := waits_for_device(func, args, kwargs):
            self.waits.append(f"{wait} at {place()}")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            with _SHAPES:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more, **named):
        """torch's, with an eye on the mask."""
        if attn_mask is not None and query.device == DEVICE and attn_mask.stride(-1) != 1:
            self.unfused.append(place())
        return _ATTENTION(query, key, value, attn_mask, *more, **named)


def waits_for_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """In words, why a GPU would have to be waited for; empty if it would not."""
    aten = torch.ops.aten
    if func is aten._to_copy.default:
        there = torch.device(kwargs["device"]) if kwargs.get("device") is not None else args[0].device
        if args[0].device == DEVICE != there:
            return "a copy to the host"
        return "a copy from pageable memory" if there == DEVICE != args[0].device and not unasked(args, kwargs) else ""
    if func is aten.copy_.default and args[0].device != args[1].device:
        return "" if args[0].device == DEVICE and unasked(args[1:], kwargs) else "a copy between host and device"
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and args[0].device == DEVICE:
        return "an index of the host" if any(t.device != DEVICE for t in tree_leaves(args[1]) if t is not None) else ""
    return ""


def unasked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy says non_blocking."""
    return bool(kwargs.get("non_blocking") or (len(args) > 1 and args[1] is True))


def place() -> str:
    """Where halfseen is now."""
    frames = [frame for frame in traceback.extract_stack() if "/tests/" not in frame.filename]
    inside = [f for f in frames if any(part in f.filename for part in ("/halfseen/", "/pretrain/", "/finetune/"))]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(inside[-3:]))


class Autocast(_AUTOCAST):
    """torch's, which has none for this device: there everything is float32."""

    def __new__(cls, kind: str, *rest, **named):
        """Nothing on the device."""
        return contextlib.nullcontext() if kind == DEVICE.type else super().__new__(cls)


def moved(module: nn.Module, *args, **kwargs) -> nn.Module:
    """nn.Module.to, which cannot swap tensors of this kind: parameters and buffers are replaced, ties kept."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def one(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            there = tensor.detach().to(*args, **kwargs)
            wanted = tensor.requires_grad
            done[id(tensor)] = tensor, nn.Parameter(there, wanted) if isinstance(tensor, nn.Parameter) else there
        return done[id(tensor)][1]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: one(tensor) for name, tensor in held.items() if tensor is not None})
    return module
