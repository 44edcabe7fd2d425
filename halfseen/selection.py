"""What trains: parameters chosen by the type of the module that owns them, never by a part of their name."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from halfseen.config import ConfigError
from halfseen.layouts import LAYOUTS
from halfseen.lora import Adapted
from halfseen.models.attention import Attention
from halfseen.models.convolutional import OnGrid
from halfseen.models.feed import Mlp
from halfseen.models.powernorm import PowerNorm
from halfseen.models.pyramid import ReducedAttention
from halfseen.models.relative import RelativeBias
from halfseen.models.swiglu import SwiGLU
from halfseen.models.swin import WindowAttention

# What each part means. Everything outside the trunk (the head, the norm in front of it) trains in every case.
PARTS = {
    "all": "every weight",
    "attention": "attention modules, every branch of a parallel block, and position tables",
    "mlp": "MLPs, every branch of a parallel block, and position tables",
    "head": "nothing in the trunk",
    "norms": "norms in the trunk",
    "bias": "biases in the trunk",
    "last:K": "the last K blocks and the final norm",
    "lora": "the low-rank maps put beside the attention's",
}
ATTENTIONS = (Attention, OnGrid, WindowAttention, ReducedAttention)
MLPS = (Mlp, SwiGLU)
NORMS = (nn.LayerNorm, _BatchNorm, PowerNorm)
BIASES = ("bias", "q_bias", "v_bias")


@dataclass(frozen=True)
class Selection:
    """What trains and what is frozen in a student; both by canonical name, in the student's order."""

    train: str  # as the config states it
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]

    def __str__(self) -> str:
        trained, frozen = count(self.trained), count(self.frozen)
        megabytes = size(self.trained) / 2**20
        return (
            f"{self.train}: {len(self.trained)} of {len(self.trained) + len(self.frozen)} tensors, {trained:,} of "
            f"{trained + frozen:,} numbers ({trained / (trained + frozen):.1%}, {megabytes:,.1f} MiB)"
        )

    def write(self, path: Path) -> None:
        """The lists, counts and bytes as JSON."""
        content: dict[str, Any] = {"train": self.train}
        for title, named in (("trained", self.trained), ("frozen", self.frozen)):
            content |= {title: {"numbers": count(named), "bytes": size(named), "names": list(named)}}
        path.write_text(json.dumps(content, indent=1) + "\n")


def count(named: dict[str, Tensor]) -> int:
    """Numbers in some tensors."""
    return sum(tensor.numel() for tensor in named.values())


def size(named: dict[str, Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in named.values())


def check(key: str, train: str) -> None:
    """Raise ConfigError for a part that does not exist."""
    parts = train.split("+")
    for part in parts:
        if part not in PARTS and not re.fullmatch(r"last:[1-9]\d*", part):
            known = ", ".join(PARTS)
            raise ConfigError(key, train, f"{part!r} is no part of a student", f"use {known}, or some joined by +")
    if len(parts) > 1 and {"all", "head"} & set(parts):
        raise ConfigError(key, train, "all and head are whole answers", "use them alone")


def freeze(student: nn.Module, train: str, *, positions: bool = True, strict_official: bool = False) -> Selection:
    """Choose what trains, set ``requires_grad`` accordingly and say what came of it.

    student: has its trunk in ``encoder``. train: one of PARTS, or several joined by +. positions: attention and mlp
    include position tables, as in DeiT's list. strict_official: DeiT's own choice by substring, for comparison.
    A parameter that does not train by its nature (a sine-cosine table) never does. Call it before the engine is made:
    gradients must be off before the first forward, or nothing is saved.
    """
    check("task.train", train)
    chosen = {id(parameter) for parameter in parameters_of(student, train, positions)}
    named = dict(student.named_parameters())
    if strict_official:
        chosen = {id(named[name]) for name in official(named, train, positions)}
    for parameter in named.values():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
    return describe(student, train)


def describe(student: nn.Module, train: str) -> Selection:
    """What trains in a student as it stands."""
    named = dict(student.named_parameters())
    trained = {name: parameter.detach() for name, parameter in named.items() if parameter.requires_grad}
    return Selection(train, trained, {name: p.detach() for name, p in named.items() if name not in trained})


def parameters_of(student: nn.Module, train: str, positions: bool) -> Iterator[nn.Parameter]:
    """The parameters that the parts name, and those outside the trunk."""
    trunk: Any = student.encoder
    inside = {id(parameter) for parameter in trunk.parameters()}
    yield from (parameter for parameter in student.parameters() if id(parameter) not in inside)
    for part in train.split("+"):
        found = list(in_trunk(trunk, part, positions))
        if not found and part != "head":
            raise ConfigError("task.train", train, f"the student has nothing that is {part!r}", "train another part")
        yield from found


def in_trunk(trunk: Any, part: str, positions: bool) -> Iterator[nn.Parameter]:
    """A part's parameters inside the trunk."""
    if part == "all":
        yield from trunk.parameters()
    elif part == "norms":
        yield from of_type(trunk, NORMS)
    elif part == "bias":
        owners = ((module, module.named_parameters(recurse=False)) for module in trunk.modules())
        yield from (parameter for _, own in owners for name, parameter in own if name in BIASES)
    elif part == "lora":
        yield from (p for module in trunk.modules() if isinstance(module, Adapted) for p in module.added())
    elif part.startswith("last:"):
        yield from last_blocks(trunk, int(part.removeprefix("last:")))
    elif part in ("attention", "mlp"):
        yield from of_type(trunk, ATTENTIONS if part == "attention" else MLPS)
        if positions:
            yield from of_type(trunk, (RelativeBias,))
            yield from (p for name, p in trunk.named_parameters() if name.rpartition(".")[2] == "pos_embed")


def of_type(trunk: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[nn.Parameter]:
    """Every parameter of every module of some types."""
    for module in trunk.modules():
        if isinstance(module, types):
            yield from module.parameters()


def last_blocks(trunk: Any, wanted: int) -> Iterator[nn.Parameter]:
    """The last blocks and the final norm; blocks that share weights are one."""
    if wanted > len(trunk.blocks):
        raise ConfigError(
            "task.train", f"last:{wanted}", f"the trunk has {len(trunk.blocks)} blocks", f"last:{len(trunk.blocks)}"
        )
    for module in (*trunk.blocks[-wanted:], trunk.norm):
        yield from module.parameters()


def official(names: Collection[str], train: str, positions: bool) -> Iterator[str]:
    """DeiT's choice (facebookresearch/deit, main.py): names containing ``.attn.`` or ``.mlp.``, the head, the table.

    In a parallel block the second branch is called attn1 there, so its weights stay frozen.
    """
    if train not in ("attention", "mlp"):
        raise ConfigError("task.strict_official", True, f"DeiT has no choice called {train}", "attention or mlp")
    part = ".attn." if train == "attention" else ".mlp."
    for ours, theirs in LAYOUTS["deit"].from_ours(set(names)).items():
        if part in theirs or theirs.startswith("head.") or (positions and theirs == "pos_embed"):
            yield ours


def still(student: nn.Module) -> None:
    """Put what must not change into evaluation mode: a trunk of which nothing trains, frozen norms with statistics.

    student: has its trunk in ``encoder``.
    """
    trunk: Any = student.encoder
    if not any(parameter.requires_grad for parameter in trunk.parameters()):
        trunk.eval()
    for module in student.modules():
        if isinstance(module, (_BatchNorm, PowerNorm)) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
