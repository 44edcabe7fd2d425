"""Meituan-AutoML/Twins, CPVT-v2: blocks by stage, PEGs beside them. Ours are one list; a PEG is in its block."""

import re

from .layout import Layout, in_trunk, out_of_trunk

_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")
_PEG = re.compile(r"pos_block\.(\d+)\.")
_OURS = re.compile(r"blocks\.(\d+)\.(peg\.)?")


def _to_ours(names: set[str]) -> dict[str, str]:
    blocks = sorted({(int(found[1]), int(found[2])) for name in names if (found := _BLOCK.match(name))})
    place = {block: number for number, block in enumerate(blocks)}

    def ours(name: str) -> str:
        if found := _BLOCK.match(name):
            return f"blocks.{place[int(found[1]), int(found[2])]}.{name[found.end() :]}"
        if found := _PEG.match(name):
            return f"blocks.{place[int(found[1]), 0]}.peg.{name[found.end() :]}"
        return name

    return {name: in_trunk(ours(name)) for name in names}


def _from_ours(names: set[str]) -> dict[str, str]:
    flat = {name: out_of_trunk(name) for name in names}
    # A stage begins with the block that has a PEG.
    matches = [found for name in flat.values() if (found := _OURS.match(name))]
    starts = sorted({int(found[1]) for found in matches if found[2]})

    def theirs(name: str) -> str:
        found = _OURS.match(name)
        if not found:
            return name
        number, rest = int(found[1]), name[found.end() :]
        stage = sum(start <= number for start in starts) - 1
        return f"pos_block.{stage}.{rest}" if found[2] else f"blocks.{stage}.{number - starts[stage]}.{rest}"

    return {name: theirs(short) for name, short in flat.items()}


CPVT = Layout(
    "cpvt",
    "Meituan-AutoML/Twins, CPVT-v2",
    lambda names: any(_PEG.match(name) for name in names) and any(name.startswith("patch_embeds.") for name in names),
    _to_ours,
    _from_ours,
)
PEG_ALONE = Layout(
    "peg",
    "one PEG of Twins or CPVT",
    lambda names: bool(names) and names <= {"proj.0.weight", "proj.0.bias"},
    lambda names: {name: name for name in names},
    lambda names: {name: name for name in names},
)
