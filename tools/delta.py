"""``halfseen delta make|apply|info|stack``: fine-tuned weights as changes to a base that many tasks share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import save_file
from torch import Tensor

from halfseen import delta, origin
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError

WEIGHTS = "a run folder, a checkpoint, or a .safetensors or .pth file"


def main(argv: Sequence[str]) -> int:
    """Run one of the four; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen delta", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="what a fine-tuned run changed")
    making.add_argument("base", type=Path, help=f"what it started from: {WEIGHTS}")
    making.add_argument("result", type=Path, help=f"the fine-tuned weights: {WEIGHTS}")
    making.add_argument("out", type=Path, help="the delta file to write (.safetensors)")
    making.add_argument("--ema", action="store_true", help="take the fine-tuned run's averaged weights")
    making.add_argument("--compress", action="store_true", help="compress, without loss: smaller, slower to load")
    making.set_defaults(action=make)
    applying = actions.add_parser("apply", help="base and deltas to whole weights")
    applying.add_argument("base", type=Path, help=WEIGHTS)
    applying.add_argument("deltas", type=Path, nargs="+", metavar="DELTA", help="one, or a chain: each on the last")
    applying.add_argument("out", type=Path, help="the .safetensors file to write")
    applying.set_defaults(action=apply)
    telling = actions.add_parser("info", help="what a delta holds")
    telling.add_argument("deltas", type=Path, nargs="+", metavar="DELTA")
    telling.set_defaults(action=info)
    stacking = actions.add_parser("stack", help="check that several deltas stand on one base, and count the bytes")
    stacking.add_argument("base", type=Path, help=WEIGHTS)
    stacking.add_argument("deltas", type=Path, nargs="+", metavar="DELTA")
    stacking.set_defaults(action=stack)
    arguments = parser.parse_args(list(argv))
    arguments.action(arguments)
    return 0


def make(arguments: argparse.Namespace) -> None:
    """Write a delta."""
    refuse_target(arguments.out)
    base, result = read_weights(arguments.base), read_weights(arguments.result, "ema" if arguments.ema else "model")
    tensors, header = delta.make(base, result, compress=arguments.compress)
    header.said = str(arguments.base)
    found = origin.of(arguments.result)
    header.config = yaml.safe_dump(found.said) if found is not None else ""
    delta.write(arguments.out, tensors, header)
    whole = size(result)
    written = arguments.out.stat().st_size
    print(
        f"{len(tensors)} of {len(result)} tensors changed, {len(header.rounded)} rounded to bfloat16\n"
        f"wrote {arguments.out}: {written:,} bytes, {written / whole:.1%} of {whole:,}"
    )


def apply(arguments: argparse.Namespace) -> None:
    """Write whole weights."""
    refuse_target(arguments.out)
    weights = read_weights(arguments.base)
    for path in arguments.deltas:
        weights = delta.apply(weights, path)
    # Tied weights share memory here, which the format has no word for: each name gets its own copy.
    whole = {name: value.contiguous().clone() for name, value in weights.items()}
    save_file(whole, arguments.out, {"format": "pt", "config": delta.Header.read(arguments.deltas[-1]).config})
    print(f"wrote {arguments.out}: {len(weights)} tensors, {arguments.out.stat().st_size:,} bytes")


def info(arguments: argparse.Namespace) -> None:
    """Say what each delta is made of."""
    for path in arguments.deltas:
        header = delta.Header.read(path)
        with delta.safe_open(path, framework="pt") as file:
            names = list(file.keys())
        print(f"{path}: {path.stat().st_size:,} bytes")
        print(f"  base      {header.base[:12]} (then at {header.said or 'an unknown place'})")
        print(f"  result    {header.result[:12]}")
        print(f"  changed   {len(names)}{', compressed' if header.packed else ''}: {brief(names)}")
        print(f"  rounded   {len(header.rounded)} to bfloat16")
        print(f"  the base's own {len(header.same)}, tied {len(header.alias)}")


def stack(arguments: argparse.Namespace) -> None:
    """Load every delta on the one base, in one process, and say what that takes."""
    base = read_weights(arguments.base)
    shared = size(base)
    own, whole = 0, 0
    for path in arguments.deltas:
        result = delta.apply(base, path)
        header = delta.Header.read(path)
        more = size({name: value for name, value in result.items() if name not in header.same})
        own, whole = own + more, whole + size(result)
        print(f"  {path}: {more:,} bytes of its own beside the base, {path.stat().st_size:,} on disk")
    print(f"{len(arguments.deltas)} students on one base: {shared + own:,} bytes in memory instead of {whole:,}")


def size(weights: dict[str, Tensor]) -> int:
    """Bytes of weights, tied ones counted once."""
    return sum({value.data_ptr(): value.numel() * value.element_size() for value in weights.values()}.values())


def brief(names: list[str]) -> str:
    """Names by the kind of module, without the block's number."""
    kinds: dict[str, int] = {}
    for name in names:
        kind = ".".join(part for part in name.split(".")[:-1] if not part.isdigit()) or name
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{kind} x{count}" for kind, count in kinds.items())


def refuse_target(out: Path) -> None:
    """Raise ConfigError for a file that exists or is called otherwise."""
    if out.suffix != ".safetensors":
        raise ConfigError("OUT", str(out), "is no .safetensors file", "end its name in .safetensors")
    if out.exists():
        raise ConfigError("OUT", str(out), "exists already", "name another file")
