"""zhoudaquan/dvit_repo (DeepViT): re-attention's two parts lie in the attention there."""

from .layout import Layout
from .timm import from_ours, to_ours

_PARTS = {".attn.reatten_matrix.": ".attn.reattention.matrix.", ".attn.var_norm.": ".attn.reattention.norm."}


def _to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        for theirs, own in _PARTS.items():
            name = name.replace(theirs, own)
        return name

    return {name: ours(own) for name, own in to_ours(names).items()}


def _from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        for original, own in _PARTS.items():
            name = name.replace(own, original)
        return name

    ours = {theirs(name): name for name in names}  # under their own names: plain ViTs have no such parts
    return {ours[name]: short for name, short in from_ours(set(ours)).items()}


DEEPVIT = Layout(
    "deepvit",
    "zhoudaquan/dvit_repo (DeepViT)",
    lambda names: any(".attn.reatten_matrix." in name for name in names),
    _to_ours,
    _from_ours,
)
