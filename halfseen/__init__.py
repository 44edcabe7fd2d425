"""halfseen: masked-image pretraining, distillation and fine-tuning of Vision Transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Backbone, load, transforms_for

__all__ = ["Backbone", "__version__", "load", "transforms_for"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Python API (halfseen/api.py) when it is first asked for: importing halfseen alone stays quick."""
    if name not in ("Backbone", "load", "transforms_for"):
        raise AttributeError(f"module 'halfseen' has no attribute {name!r}")
    from . import api

    return getattr(api, name)
