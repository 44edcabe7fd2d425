"""Delta files: what a fine-tuning changed, so that many tasks share the file of one base.

A delta is a .safetensors file with the changed tensors alone. Its header holds the digest of the base and that of the
result: base + delta is the fine-tuned student to the bit, and a wrong base is refused.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfseen import layouts
from halfseen.checkpoint.read import DELTA
from halfseen.config import ConfigError

FORMAT = f"{DELTA} 1"
LEVEL = 6  # of zlib
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Weights = Mapping[str, Tensor]


@dataclass
class Header:
    """What a delta says about itself; every field is JSON."""

    base: str = ""  # digest of the base's weights under our names
    result: str = ""  # digest of base + delta
    said: str = ""  # where the base lay when the delta was made: a hint, never relied on
    config: str = ""  # the run's config as YAML
    same: list[str] = field(default_factory=list)  # tensors that are the base's
    rounded: list[str] = field(default_factory=list)  # tensors that are the base's rounded to bfloat16
    alias: dict[str, str] = field(default_factory=dict)  # tied tensor -> the name it is stored under
    packed: dict[str, Any] = field(default_factory=dict)  # compressed tensor -> its dtype, shape, and whether xor

    @classmethod
    def read(cls, path: Path) -> "Header":
        """The header of a delta file; ConfigError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ConfigError("DELTA", str(path), f"cannot be read: {error}", "name a delta file") from error
        if found.get("format") != FORMAT:
            raise ConfigError("DELTA", str(path), "is no delta file", "make one with `halfseen delta make`")
        return cls(**json.loads(found["header"]))


def digest(weights: Weights) -> str:
    """Digest of names, types, shapes and numbers; the same for any file that holds the same weights."""
    whole = hashlib.blake2b(digest_size=32)
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(value.view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return whole.hexdigest()


def ours(weights: Weights) -> dict[str, Tensor]:
    """Weights of any known layout under our names, on the CPU."""
    return {name: value.detach().cpu() for name, value in layouts.detect(weights).take(weights).items()}


def make(base: Weights, result: Weights, *, compress: bool = False) -> tuple[dict[str, Tensor], Header]:
    """The tensors a delta must hold, and its header. base and result: weights of any layout, on the CPU."""
    base, result = ours(base), ours(result)
    header, tensors = Header(base=digest(base), result=digest(result)), {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, value in result.items():
        place = (value.data_ptr(), tuple(value.shape))
        before = base.get(name)
        if value.numel() and place in first:
            header.alias[name] = first[place]
        elif before is not None and equal(before, value):
            header.same.append(name)
        elif before is not None and before.is_floating_point() and equal(before.bfloat16().to(before.dtype), value):
            header.rounded.append(name)
        elif compress and value.numel():
            tensors[name], header.packed[name] = pack(value, before)
        else:
            tensors[name] = value.contiguous().clone()
        first.setdefault(place, name)
    return tensors, header


def write(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write a delta file and put it in place whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), partial, {"format": FORMAT, "header": json.dumps(vars(header))})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def apply(base: Weights, path: Path) -> dict[str, Tensor]:
    """The fine-tuned weights, under our names. Tensors that did not change share the base's memory.

    Raises ConfigError for another base than the delta was made from, and for a damaged delta.
    """
    header, base = Header.read(path), ours(base)
    found = digest(base)
    if found != header.base:
        raise ConfigError(
            "BASE",
            found[:12],
            f"{path} was made from other weights ({header.base[:12]}, then at {header.said or 'an unknown place'})",
            "give the very weights it was made from",
        )
    result = {name: base[name] for name in header.same}
    result |= {name: base[name].bfloat16().to(base[name].dtype) for name in header.rounded}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 -- a file, not a mapping
            value = file.get_tensor(name)
            result[name] = unpack(value, base.get(name), header.packed[name]) if name in header.packed else value
    result |= {name: result[stored] for name, stored in header.alias.items()}
    if digest(result) != header.result:
        raise ConfigError(
            "DELTA", str(path), "is damaged: it does not give the weights it was made from", "copy it anew"
        )
    return result


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits; NaN equals itself and 0 differs from -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = INTEGERS.get(one.element_size(), torch.uint8)
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits)) if one.numel() else True


def pack(value: Tensor, before: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """A tensor compressed without loss, uint8 [bytes], and how to undo it.

    Where the base has a tensor of that shape, its bits are taken off first: sign, exponent and leading digits of a
    fine-tuned weight are mostly the old ones. Bytes of equal meaning are put side by side.
    """
    how = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "xor": False}
    bits = value.contiguous().view(-1).view(INTEGERS[value.element_size()])
    if before is not None and before.shape == value.shape and before.dtype == value.dtype:
        how["xor"] = True
        bits = bits ^ before.contiguous().view(-1).view(bits.dtype)
    planes = bits.view(torch.uint8).view(-1, value.element_size()).t().contiguous()
    return torch.frombuffer(bytearray(zlib.compress(planes.numpy().tobytes(), LEVEL)), dtype=torch.uint8), how


def unpack(packed: Tensor, before: Tensor | None, how: Mapping[str, Any]) -> Tensor:
    """The inverse of pack."""
    dtype = getattr(torch, how["dtype"])
    planes = torch.frombuffer(bytearray(zlib.decompress(packed.numpy().tobytes())), dtype=torch.uint8)
    bits = planes.view(dtype.itemsize, -1).t().contiguous().view(-1).view(INTEGERS[dtype.itemsize])
    if how["xor"]:
        assert before is not None, "the base's digest was checked"
        bits = bits ^ before.contiguous().view(-1).view(bits.dtype)
    return bits.view(dtype).view(how["shape"])
