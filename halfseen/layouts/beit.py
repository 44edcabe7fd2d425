"""microsoft/unilm, beit and beit2: a flat trunk with LayerScale, biases and relative tables under names of its own."""

import math
import re
from collections.abc import Iterable

from torch import Tensor

from halfseen.models.relative import PREFIX_ROWS, relative_index

from .layout import Layout, Weights, in_trunk, only, out_of_trunk

INDEX = "relative_position_index"  # made from the grid; a file may hold it, a student never does
TABLE = "relative_position_bias_table"

# What there is of our trunk.
TRUNK = (
    r"patch_embed\.|cls_token|pos_embed|rel_pos_bias|norm\."
    r"|blocks\.\d+\.(norm[12]\.[wb]|ls[12]\.gamma|mlp\.|attn\.(qkv|proj\.|[qv]_bias|relative))"
)

_SCALE = re.compile(r"((?:blocks|cls_pt_layers)\.\d+)\.gamma_([12])$")
_OUR_SCALE = re.compile(r"((?:blocks|cls_pt_layers)\.\d+)\.ls([12])\.gamma$")
# Beside the trunk: theirs -> ours. The branch for the class token is BEiT v2's.
_BESIDE = {
    "mask_token": "mask_token",
    "lm_head.": "head.",
    "cls_pt_layers.": "aggregation.blocks.",
    "cls_pt_norm.": "aggregation.norm.",
    "cls_pt_lm_head.": "aggregation.head.",
}


def to_ours(names: set[str]) -> dict[str, str]:
    """BEiT's names -> ours."""

    def ours(name: str) -> str:
        name = _SCALE.sub(r"\1.ls\2.gamma", name)
        for theirs, mine in _BESIDE.items():
            if name.startswith(theirs):
                return mine + name.removeprefix(theirs)
        return in_trunk(name)

    return {name: ours(name) for name in names}


def from_ours(names: set[str]) -> dict[str, str]:
    """Our names -> BEiT's: a head is one over codes where there is a mask token, else over classes."""
    pretrained = "mask_token" in names

    def theirs(name: str) -> str:
        for other, mine in _BESIDE.items():
            if name.startswith(mine) and (pretrained or mine != "head."):
                name = other + name.removeprefix(mine)
                break
        else:
            name = out_of_trunk(name)
        return _OUR_SCALE.sub(r"\1.gamma_\2", name)

    return {name: theirs(name) for name in names}


def without_index(weights: Weights) -> dict[str, Tensor]:
    """The weights alone, without the index tables that a student makes itself."""
    return {name: value for name, value in weights.items() if not name.endswith(INDEX)}


def with_index(weights: Weights) -> dict[str, Tensor]:
    """The weights with an index table beside each relative table of a square grid, as the official files have them."""
    found = dict(weights)
    for name, table in weights.items():
        side = (math.isqrt(max(table.shape[0] - PREFIX_ROWS, 0)) + 1) // 2 if name.endswith(TABLE) else 0
        if side and (2 * side - 1) ** 2 + PREFIX_ROWS == table.shape[0]:
            found[name.removesuffix(TABLE) + INDEX] = relative_index((side, side), 1)
    return found


_MARK = re.compile(r"(blocks\.\d+\.attn\.(q_bias|relative_position_bias_table)|rel_pos_bias\.|lm_head\.)")


def marked(names: Iterable[str]) -> bool:
    """Whether there is anything in these names that only BEiT has."""
    return any(_MARK.match(name) for name in names)


BEIT2 = Layout(
    "beit2",
    "microsoft/unilm beit2, pretraining with patch aggregation",
    lambda names: any(name.startswith("cls_pt_") for name in names),
    to_ours,
    only(TRUNK, from_ours, "mask_token", "aggregation."),
    without_index,
    with_index,
)
BEIT = Layout(
    "beit",
    "microsoft/unilm beit and beit2, pretraining and fine-tuning",
    lambda names: marked(names) and (not any(TABLE in name for name in names) or any(INDEX in name for name in names)),
    to_ours,
    only(TRUNK, from_ours, "mask_token", "aggregation."),
    without_index,
    with_index,
)
TIMM_BEIT = Layout(
    "timm_beit",
    "timm's Beit: the same names, no index tables",
    marked,
    to_ours,
    only(TRUNK, from_ours, "mask_token", "aggregation."),
)
