"""halfseen: masked-image pretraining, distillation and fine-tuning of Vision Transformers.

Training is done by commands (`halfseen --help`). In Python, what they trained is a backbone:

    import halfseen

    model = halfseen.load("runs/mae_b16")      # a run, a checkpoint, a weight file, or a recipe
    see = halfseen.transforms_for(model)       # how it wants its pictures
    features = model.features(see("cat.jpg")[None])

More: help(halfseen.load), help(halfseen.Backbone), docs/finetuning.md.
"""

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


def __dir__() -> list[str]:
    """Names of the API, for help() and completion."""
    return [*globals(), *__all__]
