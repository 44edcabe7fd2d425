"""timm's Swin, NesT, PVT v2, Twins and TNT in a trunk of kind ``timm``: their own names under ``encoder.body``."""

import re

from .layout import Layout, beside

_BODY = "encoder.body."
# Nobody else's names; a Swin's are timm_swin's, and a Twins' are CPVT's, so those have to be asked for.
_MARK = re.compile(r"(levels\.\d+\.transformer_encoder|stages\.\d+\.blocks\.\d+\.attn)\.|pixel_pos$")


def _to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        name = name.replace("head.fc.", "head.")
        return name if beside(name) else _BODY + name

    return {name: ours(name) for name in names}


def _from_ours(names: set[str]) -> dict[str, str]:
    # Of these families only Swin's head is a module around a linear map.
    head = "head.fc." if any(name.startswith(f"{_BODY}layers.") for name in names) else "head."
    kept = {name for name in names if name.startswith(_BODY) or (beside(name) and "mask_token" not in names)}
    return {name: name.replace("head.", head) if beside(name) else name.removeprefix(_BODY) for name in kept}


TIMM_HIERARCHICAL = Layout(
    "timm_hierarchical",
    "timm's Swin, NesT, PVT v2, Twins and TNT, for trunk=timm",
    lambda names: any(_MARK.match(name) for name in names),
    _to_ours,
    _from_ours,
)
