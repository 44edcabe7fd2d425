"""Pyramids: Meituan-AutoML/Twins' CPVT-v2, whai362/PVT (v1), and one PEG alone.

Ours have a stage's positions in the module it begins with, and a PEG in the block it stands behind.
"""

import re

from .layout import Layout, in_trunk, out_of_trunk

# Theirs -> ours and back; what is not listed is called the same.
_CPVT = {r"blocks\.(\d+)\.(\d+)\.": r"stages.\1.\2.", r"pos_block\.(\d+)\.": r"stages.\1.0.peg."}
_CPVT_BACK = {r"stages\.(\d+)\.0\.peg\.": r"pos_block.\1.", r"stages\.(\d+)\.(\d+)\.": r"blocks.\1.\2."}
_PVT = re.compile(r"(patch_embed|pos_embed|block)(\d+)(?=\.|$)")
_PVT_BACK = re.compile(r"(patch_embeds|stages)\.(\d+)\.(pos_embed$)?")
_PVT_NAMES = {"patch_embed": "patch_embeds.{}", "pos_embed": "patch_embeds.{}.pos_embed", "block": "stages.{}"}


def _replaced(name: str, table: dict[str, str]) -> str:
    pattern = next((pattern for pattern in table if re.match(pattern, name)), None)
    return name if pattern is None else re.sub(pattern, table[pattern], name, count=1)


def _cpvt_from_ours(names: set[str]) -> dict[str, str]:
    if not any(name.startswith("encoder.stages.") and ".peg." in name for name in names):
        return {}
    return {name: _replaced(out_of_trunk(name), _CPVT_BACK) for name in names}


def _pvt_to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        return _PVT.sub(lambda found: _PVT_NAMES[found[1]].format(int(found[2]) - 1), name, count=1)

    return {name: in_trunk(ours(name)) for name in names}


def _pvt_from_ours(names: set[str]) -> dict[str, str]:
    if "encoder.patch_embeds.0.pos_embed" not in names:
        return {}

    def theirs(found: re.Match[str]) -> str:
        number = int(found[2]) + 1
        if found[3]:
            return f"pos_embed{number}"
        return f"patch_embed{number}." if found[1] == "patch_embeds" else f"block{number}."

    return {name: _PVT_BACK.sub(theirs, out_of_trunk(name), count=1) for name in names}


CPVT = Layout(
    "cpvt",
    "Meituan-AutoML/Twins, CPVT-v2",
    lambda names: any(name.startswith("pos_block.") for name in names) and "patch_embeds.0.proj.weight" in names,
    lambda names: {name: in_trunk(_replaced(name, _CPVT)) for name in names},
    _cpvt_from_ours,
)
PVT = Layout("pvt", "whai362/PVT, version 1", lambda names: "pos_embed1" in names, _pvt_to_ours, _pvt_from_ours)

_GENERATOR = {"proj.0.weight", "proj.0.bias"}
PEG_ALONE = Layout(
    "peg",
    "one PEG of Twins or CPVT",
    lambda names: bool(names) and names <= _GENERATOR,
    lambda names: {name: name for name in names},
    lambda names: {name: name for name in names & _GENERATOR},
)
