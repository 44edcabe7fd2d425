"""microsoft/Cream, iRPE/DeiT-with-iRPE: a DeiT whose attentions have tables of relative positions."""

from .layout import Layout, beside, out_of_trunk, plain
from .timm import to_ours

_MARK = ".attn.rpe_"


def _from_ours(names: set[str]) -> dict[str, str]:
    kept = {name for name in names if name.startswith("encoder.") or beside(name)}
    return {name: out_of_trunk(name) for name in kept if plain(name) or _MARK in name}


IRPE = Layout(
    "irpe",
    "microsoft/Cream, DeiT with iRPE",
    lambda names: any(name.startswith("blocks.") and _MARK in name for name in names),
    to_ours,
    _from_ours,
)
