"""``halfseen convert IN OUT``: weights under the names of MAE, DeiT III, timm or our own, bit for bit."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.layouts import LAYOUTS, Layout, detect


@dataclass(frozen=True)
class Conversion:
    """Converted weights, and what had no place in the destination."""

    source: Layout
    destination: Layout
    weights: dict[str, Tensor]
    left_out: list[str]  # our names

    def __str__(self) -> str:
        size = sum(value.numel() for value in self.weights.values())
        lines = [f"{self.source.name} -> {self.destination.name}: {len(self.weights)} tensors, {size:,} numbers"]
        if self.left_out:
            modules = sorted({".".join(name.split(".")[:2]) for name in self.left_out})
            shown = ", ".join(modules)
            lines.append(f"left out, {self.destination.what} has no place for it: {shown}")
        return "\n".join(lines)


def convert(weights: Mapping[str, Tensor], source: Layout, destination: Layout) -> Conversion:
    """Weights of one layout in another's names. Raises ConfigError if they are not in the source's."""
    found = detect(weights)
    if (found.name == "halfseen") != (source.name == "halfseen"):
        raise ConfigError("--from", source.name, f"these names are {found.name}'s", f"use --from {found.name}")
    ours = source.take(weights)
    placed = destination.from_ours(set(ours))
    return Conversion(source, destination, destination.give(ours), [name for name in ours if name not in placed])


def write(weights: Mapping[str, Tensor], path: Path) -> None:
    """A .safetensors file, or a .pth file with the weights under ``model`` as the originals have them."""
    # Tied weights share memory, which safetensors refuses to guess about: each name gets its own copy.
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            save_file(copies, unfinished)
        else:
            torch.save({"model": copies}, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    """Convert one file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="a run folder, a checkpoint, .safetensors or .pth")
    parser.add_argument("destination", type=Path, metavar="OUT", help=".safetensors or .pth")
    names = ", ".join(f"{layout.name} ({layout.what})" for layout in LAYOUTS.values())
    parser.add_argument("--from", dest="layout", choices=sorted(LAYOUTS), help=f"found out if not given; {names}")
    parser.add_argument("--to", required=True, choices=sorted(LAYOUTS))
    parser.add_argument("--part", default="model", choices=("model", "ema"), help="of a run: weights or their average")
    arguments = parser.parse_args(argv)
    if arguments.destination.suffix not in (".safetensors", ".pth"):
        raise ConfigError("OUT", str(arguments.destination), "is no kind of file known here", "end it in .safetensors")
    weights = read_weights(arguments.source, arguments.part)
    source = LAYOUTS[arguments.layout] if arguments.layout else detect(weights)
    result = convert(weights, source, LAYOUTS[arguments.to])
    write(result.weights, arguments.destination)
    print(f"{result}\nwrote {arguments.destination}")
    return 0
