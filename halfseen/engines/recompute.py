"""Activation recomputation, block by block; without re-entering the backward, unless FairScale is to do it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from halfseen import engine_config
from halfseen.config import ConfigError
from halfseen.models.powernorm import PowerNorm

STATISTICS = (_BatchNorm, PowerNorm)  # norms that a forward in training changes


def recompute(student: nn.Module, blocks: Sequence[nn.Module], cfg: engine_config.Engine) -> None:
    """Make every block of a student recompute, in place, as ``cfg`` says; ConfigError for blocks that cannot."""
    for block in blocks:
        refuse_statistics(block)
    if cfg.recompute_by == "fairscale":
        from .fairscale_checkpoint import reenter

        reenter(student, blocks, cfg.offload_activations)
        return
    for block in blocks:
        block.forward = (offloaded if cfg.offload_activations else recomputed)(block.forward)


def refuse_statistics(block: nn.Module) -> None:
    """Raise ConfigError if a block's norms keep running statistics: computed again, it would move them twice."""
    names = [name for name, module in block.named_modules() if isinstance(module, STATISTICS)]
    if names:
        raise ConfigError(
            "engine.recompute",
            True,
            f"{names[0]} keeps running statistics, which a second forward would move again",
            "use engine.recompute=false, or model.norm=layer and model.attention=softmax",
        )


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose activations are not kept but computed again in the backward."""

    # A function of its own: of functools.partial(checkpoint, ...) torch.compile compiles nothing, without a word.
    def run(*arguments: Any, **options: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    return run


def offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``recomputed``, whose first argument, the tokens, waits in host memory meanwhile.

    Under every engine and with shared weights, which FairScale's offload_to_cpu is not: see fairscale_checkpoint.py.
    """

    def run(x: Tensor, *arguments: Any, **options: Any) -> Any:
        device, wanted, host, given = x.device, x.requires_grad, on_host(x.detach()), [x]

        def again(*arguments: Any, **options: Any) -> Any:
            here = given.pop() if given else host.to(device, non_blocking=True).detach().requires_grad_(wanted)
            return forward(here, *arguments, **options)

        return checkpoint(again, *arguments, use_reentrant=False, **options)

    return run


def on_host(x: Tensor) -> Tensor:
    """A copy in pinned memory, which nobody waits for: the way back is on the same stream. On a CPU x itself."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
