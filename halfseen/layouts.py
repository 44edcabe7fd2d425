"""Name tables: how the weights of other projects are called here, and back.

A layout is two functions over all the names of one file (a block's branches can only be told from each
other's presence). No value changes on the way, so converting there and back is exact to the bit.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from halfseen.config import ConfigError

Renaming = Callable[[set[str]], dict[str, str]]


@dataclass(frozen=True)
class Layout:
    """One project's names.

    to_ours maps every name of a file, from_ours every name that has a place there (timm has no decoder), both
    one to one.
    """

    name: str
    what: str
    to_ours: Renaming
    from_ours: Renaming


# Modules of a student that stand beside its trunk and keep their names everywhere.
_BESIDE = re.compile(r"(head|fc_norm|head_dist)\.")
# MAE's decoder, flat there, one module here.
_DECODER = re.compile(r"decoder_(embed|pos_embed|blocks|norm|pred)(?=\.|$)")
_OUR_DECODER = re.compile(r"decoder\.(embed|pos_embed|blocks|norm|pred)(?=\.|$)")
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


def _in_trunk(name: str) -> str:
    return name if _BESIDE.match(name) else f"encoder.{name}"


def _out_of_trunk(name: str) -> str:
    return name.removeprefix("encoder.")


def _timm_to_ours(names: set[str]) -> dict[str, str]:
    return {name: _in_trunk(name) for name in names}


def _timm_from_ours(names: set[str]) -> dict[str, str]:
    return {name: _out_of_trunk(name) for name in names if not name.startswith("decoder.")}


def _mae_to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        if name == "mask_token":
            return "decoder.mask_token"
        return _DECODER.sub(r"decoder.\1", name) if _DECODER.match(name) else _in_trunk(name)

    return {name: ours(name) for name in names}


def _mae_from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        if name == "decoder.mask_token":
            return "mask_token"
        return _OUR_DECODER.sub(r"decoder_\1", name) if _OUR_DECODER.match(name) else _out_of_trunk(name)

    return {name: theirs(name) for name in names}


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

    return {name: _in_trunk(ours(name)) for name in names}


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

    return {name: theirs(short) for name, short in _timm_from_ours(names).items()}


_STEM = "encoder.patch_embed."

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("halfseen", "a run's own names", lambda n: {x: x for x in n}, lambda n: {x: x for x in n}),
        Layout("mae", "facebookresearch/mae, pretraining and fine-tuning", _mae_to_ours, _mae_from_ours),
        Layout("deit", "facebookresearch/deit models_v2 (DeiT III)", _deit_to_ours, _deit_from_ours),
        Layout(
            "deit_stem",
            "the hMLP stem of DeiT III alone",
            lambda names: {name: _STEM + name for name in names},
            lambda names: {name: name.removeprefix(_STEM) for name in names if name.startswith(_STEM)},
        ),
        Layout("timm", "timm's VisionTransformer", _timm_to_ours, _timm_from_ours),
    )
}


def detect(names: Iterable[str]) -> Layout:
    """The layout these names are in. Raises ConfigError when they are no Vision Transformer's.

    An encoder without LayerScale is called the same by MAE, DeiT and timm; it is reported as timm's.
    """
    listed = set(names)
    if any(name.startswith("encoder.") for name in listed):
        return LAYOUTS["halfseen"]
    if any(_DECODER.match(name) for name in listed):
        return LAYOUTS["mae"]
    if any((found := _DEIT.match(name)) and (found[3] or found[2].startswith("gamma")) for name in listed):
        return LAYOUTS["deit"]
    if any(name.startswith("blocks.") for name in listed):
        return LAYOUTS["timm"]
    if listed and all(name.startswith("proj.") for name in listed):
        return LAYOUTS["deit_stem"]
    raise ConfigError(
        "run.init",
        sorted(listed)[:4],
        "these weights are in no known layout",
        f"give a run folder, or weights named as one of {sorted(LAYOUTS)} (see `halfseen convert --help`)",
    )


def rename(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights that the table names, under their new names, values untouched.

    Raises ValueError if two would become one.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in table:
            if table[name] in renamed:
                raise ValueError(f"{name} and another weight would both be called {table[name]}")
            renamed[table[name]] = value
    return renamed
