"""FairScale's checkpoint_wrapper around a student's blocks, where that is right.

A block's backward is then a backward of its own inside of the whole one. So a weight that two blocks reach would be
ready twice: DDP stops there, and ShardedDDP may sum it wrongly. That is refused. Two more faults are mended: a gradient
passes only through tensors that are themselves arguments or results, so tensors inside of other objects are handed over
one by one; and the wrapper knows autocast as it was before bf16, so a block enters the forward's autocast by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn

from halfseen.config import ConfigError

from .student import uses


def reenter(student: nn.Module, blocks: Sequence[nn.Module], offload: bool) -> None:
    """Recompute every block by FairScale, in place; offload: what goes into a block waits in host memory.

    Raises ConfigError for blocks that share a weight, and in a step for one that is called twice.
    """
    refuse_sharing(student, blocks)
    called: set[int] = set()
    student.register_forward_pre_hook(lambda module, arguments: called.clear())
    for block in blocks:
        block.forward = _once(Unit(block, offload), id(block), called)


def refuse_sharing(student: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise ConfigError if a weight that trains belongs to two blocks, or to one and to what is around them."""
    owner: dict[int, int] = {}
    for name, parameter, block in uses(student, blocks):
        if parameter.requires_grad and owner.setdefault(id(parameter), block) != block:
            raise _unsafe(f"{name} is a weight of another block too, and would be ready twice")


def _once(unit: "Unit", block: int, called: set[int]) -> Callable[..., Any]:
    """A block's forward that refuses a second call in the same step."""

    def run(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            if block in called:
                raise _unsafe("a block is called twice in a step, and its weights would be ready twice")
            called.add(block)
        return unit.call(*arguments, **options)

    return run


def _unsafe(reason: str) -> ConfigError:
    return ConfigError(
        "engine.recompute_by", "fairscale", reason, "use engine.recompute_by=torch, which is right there"
    )


class Unit(nn.Module):
    """What checkpoint_wrapper wraps: takes tensors and returns tensors, whatever the block takes and returns."""

    def __init__(self, block: nn.Module, offload: bool) -> None:
        super().__init__()
        self.block, self._compute = block, block.forward  # the block's forward becomes the one that calls this
        checkpoint_wrapper(self, offload_to_cpu=offload)

    def call(self, *arguments: Any, **options: Any) -> Any:
        """The block's answer to any arguments."""
        tensors: list[Tensor] = []
        form = taken_apart((arguments, options), tensors)
        device = tensors[0].device.type
        autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        answer: list[Any] = []  # the form of the block's answer; a recomputation adds the same again
        results = self(*tensors, form=form, autocast=autocast, answer=answer)
        return put_together(answer[0], list(results))

    def forward(self, *tensors: Tensor, form: Any, autocast: dict[str, Any], answer: list[Any]) -> tuple[Tensor, ...]:
        """The block's forward, from tensors to tensors."""
        arguments, options = put_together(form, list(tensors))
        with torch.autocast(**autocast):
            result = self._compute(*arguments, **options)
        results: list[Tensor] = []
        answer.append(taken_apart(result, results))
        return tuple(results)


class Number(int):
    """Stands where a tensor stood: its number in the list."""


def taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The value with a Number for every tensor in its tuples, lists, dicts and dataclasses; they go to ``tensors``.

    Each once: autograd would lose the gradient of the first of two results that are one tensor.
    """
    if isinstance(value, Tensor):
        known = [number for number, tensor in enumerate(tensors) if tensor is value]
        if not known:
            tensors.append(value)
        return Number(known[0] if known else len(tensors) - 1)
    return _rebuilt(value, lambda entry: taken_apart(entry, tensors))


def put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The value again, from its form and the tensors."""
    return tensors[form] if isinstance(form, Number) else _rebuilt(form, lambda entry: put_together(entry, tensors))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value)(change(entry) for entry in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple
        return type(value)(*(change(entry) for entry in value))
    if type(value) is dict:
        return {key: change(entry) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: change(getattr(value, field.name)) for field in fields(value)})
    return value
