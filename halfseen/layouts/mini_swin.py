"""microsoft/Cream, MiniViT/Mini-Swin: what each repetition has for itself is in lists beside the shared parts."""

import re

from . import swin
from .layout import Layout, only

# Their list -> our module.
_LISTS = {
    "norm1_list": "norm1",
    "norm2_list": "norm2",
    "local_norm_list": "local_norm",
    "local_conv_list": "local_conv",
    "proj_l": "attn.proj_l",
    "proj_w": "attn.proj_w",
}
_THEIRS = re.compile(rf"(layers\.\d+\.blocks\.\d+)\.({'|'.join(_LISTS)})\.(\d+)(?=\.)")
_OURS = re.compile(r"(layers\.\d+\.blocks\.\d+)\.(norm1|norm2|local_norm|local_conv|attn\.proj_l|attn\.proj_w)")
_NAMES = {ours: theirs for theirs, ours in _LISTS.items()}
_FIT = "fit_dense_C."


def _to_ours(names: set[str]) -> dict[str, str]:
    found = {name: _THEIRS.match(name) for name in names}
    several = {match[1] for match in found.values() if match and match[3] != "0"}

    def ours(name: str) -> str:
        match = found[name]
        if not match:
            return name
        block, part, repetition = match.groups()
        return f"{block}.{_LISTS[part]}" + (f".{repetition}" if block in several else "") + name[match.end() :]

    trunk = {name: ours(name) for name in names if not name.startswith(_FIT)}
    table = swin.official_to_ours(set(trunk.values()))
    fits = {name: name.replace(_FIT, "fits.") for name in names if name.startswith(_FIT)}
    return {name: table[mine] for name, mine in trunk.items() if mine in table} | fits


def _from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        match = _OURS.match(name)
        if not match:
            return name.replace("fits.", _FIT)
        rest = name[match.end() :]
        rest = rest if re.match(r"\.\d+\.", rest) else f".0{rest}"
        return f"{match[1]}.{_NAMES[match[2]]}{rest}"

    return {name: theirs(official) for name, official in swin.official_from_ours(names).items()}


MINI_SWIN = Layout(
    "mini_swin",
    "microsoft/Cream, Mini-Swin",
    lambda names: any(_THEIRS.match(name) for name in names),
    _to_ours,
    only(swin.TRUNK, _from_ours, "fits."),
)
