"""microsoft/SimMIM: a BEiT or a Swin under ``encoder``, and the head as a 1x1 convolution."""

import re

from torch import Tensor

from halfseen.config import ConfigError
from halfseen.models.relative import relative_index

from . import beit, swin
from .layout import Layout, Weights, only

_HEAD = re.compile(r"(decoder\.0|head)\.(weight|bias)$")
_GAMMA = re.compile(r"(blocks\.\d+)\.gamma_([12])$")
_SCALE = re.compile(r"(blocks\.\d+)\.ls([12])\.gamma$")
_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"


def _to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        if name == "encoder.mask_token":
            return "mask_token"
        return _GAMMA.sub(r"\1.ls\2.gamma", swin.merges(name, 1))

    return {name: ours(name) for name in names}


def _from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        if name == "mask_token":
            return "encoder.mask_token"
        return _SCALE.sub(r"\1.gamma_\2", swin.merges(name, -1))

    # A head without a mask token beside it is a classifier's.
    kept = {name for name in names if "mask_token" in names or not name.startswith("head.")}
    return {name: theirs(name) for name in kept if name.startswith("encoder.") or name in ("mask_token", *_OUR_HEAD)}


_OUR_HEAD = ("head.weight", "head.bias")
_THEIR_HEAD = {"decoder.0.weight", "decoder.0.bias"}


def _join(weights: Weights) -> dict[str, Tensor]:
    """Their head as a linear map, pixels in our order; tables that follow from the sizes left out."""
    kept = {name: value for name, value in weights.items() if not name.endswith((_INDEX, ".attn_mask"))}
    return {_renamed(name, "head"): _reordered(name, value, theirs=True) for name, value in kept.items()}


def _part(weights: Weights) -> dict[str, Tensor]:
    """The inverse; index tables are made anew. Masks of shifted windows are not: they depend on the image's size."""
    found = {_renamed(name, "decoder.0"): _reordered(name, value, theirs=False) for name, value in weights.items()}
    for name, value in weights.items():
        if name.endswith(_TABLE):
            found[name.removesuffix(_TABLE) + _INDEX] = index_of(len(value))
    return found


def _renamed(name: str, module: str) -> str:
    return _HEAD.sub(rf"{module}.\2", name)


def _reordered(name: str, value: Tensor, theirs: bool) -> Tensor:
    """Rows of the head: channel, row, column in a convolution before a pixel shuffle; row, column, channel here."""
    if not _HEAD.match(name):
        return value
    side = round((len(value) / 3) ** 0.5)
    if 3 * side**2 != len(value):
        reason = f"a head of {len(value)} numbers a place does not predict the pixels of a square, as SimMIM's does"
        raise ConfigError("--to", "simmim", reason, "use another layout, e.g. beit for codes")
    if theirs:
        return value.unflatten(0, (3, side, side)).movedim(0, 2).flatten(0, 2).reshape(len(value), *value.shape[1:2])
    value = value.unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)
    return value[..., None, None] if value.ndim == 2 else value


def index_of(rows: int) -> Tensor:
    """The index table of a relative table with so many rows over a square, with or without rows for a class token."""
    side = round(rows**0.5)
    prefix = 0 if side**2 == rows else 1
    side = round((rows - 3 * prefix) ** 0.5)
    return relative_index(((side + 1) // 2, (side + 1) // 2), prefix)


def _owns(names: set[str]) -> bool:
    """A mask token, or a head as a whole decoder: that of a discrete VAE has further layers."""
    return "encoder.mask_token" in names or {name for name in names if name.startswith("decoder.")} == _THEIR_HEAD


SIMMIM = Layout(
    "simmim",
    "microsoft/SimMIM, ViT and Swin",
    _owns,
    _to_ours,
    only(f"{beit.TRUNK}|{swin.TRUNK}", _from_ours, "mask_token"),
    _join,
    _part,
)
