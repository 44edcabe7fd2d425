"""``halfseen multiplex WEIGHTS OUT --share S``: a trained trunk's weights for one whose blocks share theirs.

Consecutive blocks become one: what MiniViT shares (attention and MLP maps, relative position tables) is combined, what
each repetition has for itself (norms, LayerScale, iRPE tables, maps over heads) is kept. How far the shared weights are
from each block's own is printed; the student starts from OUT with run.init=OUT.safetensors.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfseen import layouts
from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError

_BLOCK = re.compile(r"encoder\.(layers\.(\d+)\.)?blocks\.(\d+)\.")
# Parts of a block that every repetition has for itself.
_OWN = re.compile(r"(norm1|norm2|ls1|ls2|local_norm|local_conv|attn\.(?:rpe_[qkv]|proj_l|proj_w|reattention))\.")


@dataclass(frozen=True)
class Misfit:
    """How far a shared tensor is from those it stands for: |W_block - W_shared| / |W_block|, block by block."""

    name: str
    distances: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.name:<52} " + "  ".join(f"{distance:.3f}" for distance in self.distances)


Groups = list[list[int]]  # of each stage (a ViT has one): how many consecutive blocks share, group by group


def multiplex(
    weights: Mapping[str, Tensor], groups: Groups, choose: str = "average"
) -> tuple[dict[str, Tensor], list[Misfit]]:
    """Weights under our names for a trunk with groups of consecutive blocks, and the misfit of every shared tensor.

    groups: see groups_of. choose: average, first, or the number of a block in its group, whose weights are taken.
    """
    pick = picker(choose, max(max(stage) for stage in groups))
    made: dict[str, Tensor] = {}
    members: dict[str, list[Tensor]] = defaultdict(list)
    # Of each stage: a block's group, its place in there, and how many there are.
    places = [
        [(group, place, count) for group, count in enumerate(stage) for place in range(count)] for stage in groups
    ]
    for name in sorted(weights, key=number_of):
        found, value = _BLOCK.match(name), weights[name]
        if not found:
            made[name] = value
            continue
        group, place, count = places[int(found[2] or 0)][int(found[3])]
        stem, part = f"encoder.{found[1] or ''}blocks.{group}.", name[found.end() :]
        if count == 1:
            made[stem + part] = value
        elif own := _OWN.match(part):
            made[f"{stem}{own[1]}.{place}.{part[own.end() :]}"] = value
        else:
            members[stem + part].append(value)
    misfits = []
    for name, values in members.items():
        made[name] = pick(values)
        misfits.append(Misfit(name, tuple(distance(value, made[name]) for value in values)))
    return made, misfits


def number_of(name: str) -> int:
    """The block that a weight belongs to; 0 for the others."""
    found = _BLOCK.match(name)
    return int(found[3]) if found else 0


def groups_of(weights: Mapping[str, Tensor], share: Sequence[int], groups: Sequence[int] = ()) -> Groups:
    """The groups of each stage of a trunk with these weights. ConfigError if they do not come out even.

    share: blocks in a group; one number for a ViT, one for each stage of a hierarchical trunk. groups: of a ViT, how
    many blocks each group has, instead.
    """
    depths: dict[int, int] = {}
    for found in filter(None, map(_BLOCK.match, weights)):
        stage = int(found[2] or 0)
        depths[stage] = max(depths.get(stage, 0), int(found[3]) + 1)
    refuse_repeated(weights, depths)
    if groups:
        if len(depths) != 1 or sum(groups) != depths[0] or min(groups) < 1:
            reason = f"the trunk has stages of {list(depths.values())} blocks"
            raise ConfigError("--groups", list(groups), reason, "say of every group of a ViT how many blocks it has")
        return [list(groups)]
    if sorted(depths) != list(range(len(share))):
        raise ConfigError(
            "--share", list(share), f"the trunk has {len(depths)} stages of blocks", "give one number for each of them"
        )
    for stage, depth in depths.items():
        if share[stage] < 1 or depth % share[stage]:
            raise ConfigError("--share", share[stage], f"does not divide {depth} blocks", "use a divisor, or --groups")
    return [[count] * (depths[stage] // count) for stage, count in enumerate(share)]


def refuse_repeated(weights: Mapping[str, Tensor], depths: Mapping[int, int]) -> None:
    """Raise ConfigError if the trunk's blocks share weights already."""
    if any(re.search(r"\.norm1\.\d+\.", name) for name in weights):
        raise ConfigError("WEIGHTS", dict(depths), "the blocks of this trunk share weights already", "give a plain one")


def picker(choose: str, largest: int) -> "Picker":
    """The rule that ``choose`` names, for groups of at most ``largest`` blocks."""
    if choose == "average":
        return Picker(None)
    number = 0 if choose == "first" else int(choose) if choose.isdecimal() else -1
    if not 0 <= number < largest:
        raise ConfigError("--choose", choose, "is no rule", f"average, first, or a block's number below {largest}")
    return Picker(number)


@dataclass(frozen=True)
class Picker:
    """One tensor for several: their mean, or one of them (the last where a group is smaller)."""

    number: int | None

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        if self.number is None:
            return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
        return values[min(self.number, len(values) - 1)].clone()


def distance(value: Tensor, shared: Tensor) -> float:
    """|value - shared| / |value|; 0 for two tensors of zeros."""
    size = value.double().norm().item()
    apart = (value.double() - shared.double()).norm().item()
    return apart / size if size else apart


def identity_maps(weights: Mapping[str, Tensor], heads: Sequence[int], groups: Groups) -> dict[str, Tensor]:
    """Maps over heads that change nothing, for every repetition, so that a student with mixed heads starts as without.

    weights: as multiplex made them. heads: of each stage. Biases, where the student has them, start at zero anyway.
    """
    if len(heads) != len(groups):
        reason = f"the trunk has {len(groups)} stages of blocks"
        raise ConfigError("--identity-maps", list(heads), reason, "give one number of heads for each")
    found: dict[str, Tensor] = {}
    for name in weights:
        if (block := _BLOCK.match(name)) and name.endswith("attn.qkv.weight"):
            stage = int(block[2] or 0)
            count = groups[stage][int(block[3])]
            for repetition in range(count):
                entry = f".{repetition}" if count > 1 else ""
                for part in ("proj_l", "proj_w"):
                    found[f"{block[0]}attn.{part}{entry}.weight"] = torch.eye(heads[stage])
    return found


def main(argv: Sequence[str]) -> int:
    """Write the shared trunk's weights and print the misfit; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="halfseen multiplex", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="a run, a checkpoint or a weight file; ours, timm's, DeiT's, MAE's")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--share", help="blocks in a group: 2; of a hierarchical trunk per stage: 2,2,6,2")
    which.add_argument("--groups", help="of a ViT: blocks of each group in turn, as model.groups: 1,2,2,1")
    parser.add_argument(
        "--choose", default="average", help="average (default), first, or a block's number in its group"
    )
    parser.add_argument("--ema", action="store_true", help="of a run: its averaged weights")
    parser.add_argument(
        "--identity-maps", metavar="HEADS", help="add maps over so many heads (per stage) that change nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        raise ConfigError("OUT", str(arguments.out), "exists already", "name another file")
    given = read_weights(arguments.weights, "ema" if arguments.ema else "model")
    layout = layouts.detect(given)
    share = numbers("--share", arguments.share) if arguments.share else ()
    ours = layout.take(given)
    groups = groups_of(ours, share, numbers("--groups", arguments.groups) if arguments.groups else ())
    made, misfits = multiplex(ours, groups, arguments.choose)
    if arguments.identity_maps:
        made |= identity_maps(made, numbers("--identity-maps", arguments.identity_maps), groups)
    save_file({name: value.contiguous() for name, value in made.items()}, arguments.out)
    report(made, given, misfits)
    print(f"wrote {arguments.out}; start a student of the same size with run.init={arguments.out}")
    return 0


def numbers(key: str, text: str) -> list[int]:
    """Whole numbers separated by commas."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(key, text, "is no list of whole numbers", "e.g. 2, or 2,2,6,2")
    return [int(part) for part in text.split(",")]


def report(made: Mapping[str, Tensor], given: Mapping[str, Tensor], misfits: Sequence[Misfit]) -> None:
    """Print the loss of fit of every shared tensor and the numbers of parameters."""
    print("distance of each block's own tensor from the shared one, over its size (1: unrelated, 0: equal)")
    for misfit in misfits:
        print(f"  {misfit}")
    matrices = [max(misfit.distances) for misfit in misfits if misfit.name.endswith("weight")]
    if matrices:
        print(f"matrices: mean {sum(matrices) / len(matrices):.3f}, largest {max(matrices):.3f}")
    counts = [sum(value.numel() for value in weights.values()) for weights in (given, made)]
    print(f"parameters {counts[0]:,} -> {counts[1]:,}")
