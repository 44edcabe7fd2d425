"""facebookresearch/deit, models_v2.py: LayerScale and the branches of parallel blocks under their own names."""

import re

from halfseen.config import ConfigError

from . import timm
from .layout import Layout, in_trunk

# A DeiT III block's parts: branch 0 has no number, branch 1 has a 1 appended.
_DEIT = re.compile(r"(blocks\.\d+)\.(norm1|attn|gamma_1|norm2|mlp|gamma_2)(1|_1)?(?=\.|$)")
_PARALLEL = re.compile(r"(blocks\.\d+)\.(attns|ffns)\.(\d+)\.(norm|attn|mlp|ls)(?=\.)")
_SINGLE_SCALE = re.compile(r"(blocks\.\d+)\.ls([12])\.gamma$")
# DeiT's part -> the list of branches it is in here, and its name in a branch.
_BRANCH = {
    "norm1": ("attns", "norm"),
    "attn": ("attns", "attn"),
    "gamma_1": ("attns", "ls"),
    "norm2": ("ffns", "norm"),
    "mlp": ("ffns", "mlp"),
    "gamma_2": ("ffns", "ls"),
}
_THEIRS = {ours: theirs for theirs, ours in _BRANCH.items()}


def _deit_to_ours(names: set[str]) -> dict[str, str]:
    matches = {name: _DEIT.match(name) for name in names}
    parallel = {found[1] for found in matches.values() if found and found[3]}

    def ours(name: str) -> str:
        found = matches[name]
        if not found:
            return name
        block, part, branch = found.groups()
        rest = ".gamma" if part.startswith("gamma") else name[found.end() :]
        if block in parallel:
            side, own = _BRANCH[part]
            return f"{block}.{side}.{1 if branch else 0}.{own}{rest}"
        return f"{block}.ls{part[-1]}.gamma" if part.startswith("gamma") else name

    return {name: in_trunk(ours(name)) for name in names}


def _deit_from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        if found := _PARALLEL.match(name):
            block, side, branch, own = found.groups()
            if int(branch) > 1:
                raise ConfigError("--to", "deit", f"{name}: DeiT has at most two branches", "use --to timm")
            part = _THEIRS[side, own]
            part += ("_1" if own == "ls" else "1") if branch == "1" else ""
            return f"{block}.{part}" + ("" if own == "ls" else name[found.end() :])
        return _SINGLE_SCALE.sub(r"\1.gamma_\2", name)

    return {name: theirs(short) for name, short in timm.from_ours(names).items()}


_STEM = "encoder.patch_embed."

DEIT = Layout(
    "deit",
    "facebookresearch/deit models_v2 (DeiT III)",
    lambda names: any((found := _DEIT.match(name)) and (found[3] or found[2].startswith("gamma")) for name in names),
    _deit_to_ours,
    _deit_from_ours,
)
DEIT_STEM = Layout(
    "deit_stem",
    "the hMLP stem of DeiT III alone",
    lambda names: bool(names) and all(name.startswith("proj.") for name in names),
    lambda names: {name: _STEM + name for name in names},
    lambda names: {name: name.removeprefix(_STEM) for name in names if name.startswith(_STEM)},
)
