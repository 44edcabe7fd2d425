"""The trunk and its parts."""

from .sizes import SIZES, Size, resolve
from .vit import ViT

__all__ = ["SIZES", "Size", "ViT", "resolve"]
