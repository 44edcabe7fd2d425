"""microsoft/Cream, Mini-DeiT: each repetition's own parts are in ``instances``; maps over heads are convolutions."""

import re

from torch import Tensor

from .layout import Layout, Weights, in_trunk, only, out_of_trunk

_INSTANCE = re.compile(r"(blocks\.\d+\.)block\.(.+)\.instances\.(\d+)\.")
_SHARED = re.compile(r"(blocks\.\d+\.)block\.")
_OWN = re.compile(r"(blocks\.\d+\.)(norm1|norm2|attn\.(?:rpe_[qkv]|proj_l|proj_w))\.(\d+)\.")
_BLOCK = re.compile(r"(blocks\.\d+\.)")
# Every block there is repeated.
_TRUNK = r"patch_embed\.|cls_token|pos_embed|norm\.|blocks\.\d+\.(norm[12]\.\d+\.|attn\.(qkv|proj|rpe_)|mlp\.)"
_CONVS = {"attn.conv_l": "attn.proj_l", "attn.conv_w": "attn.proj_w"}
_MAPS = {ours: theirs for theirs, ours in _CONVS.items()}


def _to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        if found := _INSTANCE.match(name):
            block, part, repetition = found.groups()
            return f"{block}{_CONVS.get(part, part)}.{repetition}.{name[found.end() :]}"
        return _SHARED.sub(r"\1", name)

    return {name: in_trunk(ours(name)) for name in names}


def _from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        if found := _OWN.match(name):
            block, part, repetition = found.groups()
            return f"{block}block.{_MAPS.get(part, part)}.instances.{repetition}.{name[found.end() :]}"
        return _BLOCK.sub(r"\1block.", name)

    return {name: theirs(out_of_trunk(name)) for name in names}


def _is_map(name: str) -> bool:
    return re.search(r"\.conv_[lw]\.", name) is not None


def _join(weights: Weights) -> dict[str, Tensor]:
    """The convolutions [H, H, 1, 1] as the matrices they are."""
    return {name: value.flatten(1) if _is_map(name) else value for name, value in weights.items()}


def _part(weights: Weights) -> dict[str, Tensor]:
    return {name: value[..., None, None] if _is_map(name) else value for name, value in weights.items()}


MINI_DEIT = Layout(
    "mini_deit",
    "microsoft/Cream, Mini-DeiT",
    lambda names: any(_SHARED.match(name) for name in names),
    _to_ours,
    only(_TRUNK, _from_ours),
    _join,
    _part,
)
