"""What a student keeps of each image from its forward to its backward: counted here, on two images, before a job waits
for GPUs that turn out to be too small."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.distributed import World
from halfseen.engine_config import Engine

IMAGES = 2  # that go through the student; what is kept grows with their number

# Share that remains in half precision. Of each token and channel a block keeps 16 numbers: what enters its two norms,
# which stay fp32, and 14 in the type of autocast: the inputs of qkv, proj and fc1, q, k and v, and 4 each before and
# behind the activation of an MLP of four times the width. They are the items of Korthikanti et al. (2022), section 4.1,
# without its dropout masks and, since attention is fused, without its scores.
HALF = (2 * 4 + 14 * 2) / (16 * 4)


@dataclass
class Kept:
    """Bytes kept per image by a forward in fp32, apart from weights."""

    outside: float = 0.0  # of the blocks: stem, heads, losses
    inside: list[float] = field(default_factory=list)  # each call of a block, its input included
    inputs: list[float] = field(default_factory=list)  # each call's input alone: all that recomputation keeps of it

    def per_image(self, cfg: Engine) -> float:
        """Bytes an image takes on a device with the engine's options; without what torch.compile spares."""
        share = 1.0 if cfg.precision == "fp32" else HALF
        if not cfg.recompute:
            return share * (self.outside + sum(self.inside))
        waiting = 0.0 if cfg.offload_activations else sum(self.inputs)  # tokens stay fp32 between blocks
        return share * (self.outside + max(self.inside, default=0.0)) + waiting


def casts(student: nn.Module, cfg: Engine) -> int:
    """Bytes of the half-precision copies of matrices that autocast makes and the backward needs, whatever the batch."""
    if cfg.precision == "fp32":
        return 0
    blocks: list[nn.Module] = list(student.blocks())  # type: ignore[operator]
    sizes = [2 * sum(weight.numel() for weight in block.parameters() if weight.ndim > 1) for block in blocks]
    return max(sizes, default=0) if cfg.recompute else sum(sizes)


def count(module: Any, config: Any, folder: Path) -> Kept:
    """Send two images of a stage through its student, on the CPU. Takes about as long as building the student twice.

    module: the stage's, with ``parts``. config: its config, whose batch, mixing and engine do not matter here.
    """
    run = replace(config.run, global_batch=IMAGES, micro_batch=None)
    augment = replace(config.augment, mixup=0.0, cutmix=0.0)
    small = replace(config, run=run, augment=augment, data=replace(config.data, workers=0))
    parts = module.parts(small, World(), folder)
    batch = parts.prepare(next(parts.stream(0)))
    return kept(parts.student, batch)


def kept(student: nn.Module, batch: dict[str, Any]) -> Kept:
    """What a forward of a prepared batch keeps: every storage once, and no weight."""
    images = len(batch["image"])
    if getattr(student, "learns_from_average", False):
        with torch.no_grad():
            batch = batch | student.eval()(batch | {"task": "teach"})
        student.train()
    found, current = Kept(), [-1]  # number of the call we are in, -1 outside of blocks
    seen = {tensor.untyped_storage().data_ptr(): None for tensor in (*student.parameters(), *student.buffers())}
    alive = []  # what was seen, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = None
            alive.append(storage)
            if current[0] < 0:
                found.outside += storage.nbytes() / images
            else:
                found.inside[current[0]] += storage.nbytes() / images
        return tensor

    def enter(block: nn.Module, given: tuple[Any, ...]) -> None:
        current[0] = len(found.inside)
        found.inside.append(0.0)
        found.inputs.append(given[0].nbytes / images if given[0].requires_grad else 0.0)

    def leave(block: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        current[0] = -1

    with ExitStack() as stack:
        for block in student.blocks():  # type: ignore[operator]
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        student(batch)
    return found


def beside(prepare: Any, student: nn.Module) -> int:
    """Bytes of the frozen networks that a stage keeps on the device beside its student: teachers, tokenizers."""
    own = {id(weight) for weight in student.parameters()}
    others = {id(weight): weight.nbytes for module in modules(prepare) for weight in module.parameters()}
    return sum(size for key, size in others.items() if key not in own)


def modules(thing: Any, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """Every network that an object of this package holds, in whatever attribute."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        yield thing
    elif type(thing).__module__.startswith("halfseen.") and hasattr(thing, "__dict__"):
        for value in vars(thing).values():
            yield from modules(value, seen)
