"""Swin Transformers: Microsoft's names and timm's. Ours are timm's, with the trunk under ``encoder``."""

import re

from .layout import Layout, in_trunk, only, out_of_trunk

_MERGE = re.compile(r"layers\.(\d+)\.downsample\.")
# Tables that follow from the sizes; they are made anew here.
_MADE = re.compile(r"\.(attn_mask|relative_position_index)$")
TRUNK = r"patch_embed\.|absolute_pos_embed|layers\.|norm\."  # what there is of our trunk


def merges(name: str, by: int) -> str:
    """The name with the stage of its merging moved: Microsoft counts it to the stage before, timm to the one after."""
    return _MERGE.sub(lambda found: f"layers.{int(found[1]) + by}.downsample.", name)


def official_to_ours(names: set[str]) -> dict[str, str]:
    """Microsoft's names -> ours."""
    return {name: in_trunk(merges(name, 1)) for name in names if not _MADE.search(name)}


def official_from_ours(names: set[str]) -> dict[str, str]:
    """Our names -> Microsoft's."""
    return {name: merges(out_of_trunk(name), -1) for name in names}


def staged(names: set[str]) -> bool:
    """Whether these are the names of a hierarchical trunk with windows."""
    return any(name.startswith("layers.0.blocks.0.attn.relative_position_bias_table") for name in names)


def _timm_to_ours(names: set[str]) -> dict[str, str]:
    return {name: in_trunk(name.replace("head.fc.", "head.")) for name in names if not _MADE.search(name)}


def _timm_from_ours(names: set[str]) -> dict[str, str]:
    return {name: re.sub(r"^head\.", "head.fc.", out_of_trunk(name)) for name in names}


TIMM_SWIN = Layout(
    "timm_swin",
    "timm's SwinTransformer",
    lambda names: staged(names) and not any(name.startswith(("layers.0.downsample.", "head.w")) for name in names),
    _timm_to_ours,
    only(TRUNK, _timm_from_ours),
)
SWIN = Layout("swin", "microsoft/Swin-Transformer", staged, official_to_ours, only(TRUNK, official_from_ours))
