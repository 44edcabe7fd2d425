"""timm's VisionTransformer: our trunk's names without ``encoder``."""

from .layout import Layout, beside, in_trunk, out_of_trunk, plain


def to_ours(names: set[str]) -> dict[str, str]:
    """timm's names -> ours."""
    return {name: in_trunk(name) for name in names}


def from_ours(names: set[str]) -> dict[str, str]:
    """Our names -> timm's: the trunk and a classifier. What else is pretrained, and a head beside it, has no place."""
    kept = {name for name in names if name.startswith("encoder.") or (beside(name) and "mask_token" not in names)}
    return {name: out_of_trunk(name) for name in kept if plain(name)}


def owns(names: set[str]) -> bool:
    """A ViT of blocks, without a mark of another project: MAE and DeiT call a plain encoder the same."""
    return any(name.startswith("blocks.") for name in names)


TIMM = Layout("timm", "timm's VisionTransformer", owns, to_ours, from_ours)
