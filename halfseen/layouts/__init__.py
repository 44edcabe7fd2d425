"""Name tables: how the weights of other projects are called here, and back.

One file per project. No value changes on the way, so converting there and back is exact to the bit.
"""

from collections.abc import Iterable

from halfseen.config import ConfigError

from .beit import BEIT, BEIT2, TIMM_BEIT
from .cpvt import CPVT, PEG_ALONE, PVT
from .dalle import DALLE
from .deepvit import DEEPVIT
from .deit import DEIT, DEIT_STEM
from .hdvw import HDVW, HDVW_CONVIT
from .irpe import IRPE
from .layout import Layout, in_trunk, out_of_trunk, rename
from .mae import MAE
from .mini_deit import MINI_DEIT
from .mini_swin import MINI_SWIN
from .simmim import SIMMIM
from .swin import SWIN, TIMM_SWIN
from .timm import TIMM
from .timm_hierarchical import TIMM_HIERARCHICAL
from .transformers import TRANSFORMERS
from .vqkd import VQKD

__all__ = ["LAYOUTS", "Layout", "detect", "in_trunk", "out_of_trunk", "rename"]

OURS = Layout(
    "halfseen",
    "a run's own names",
    lambda names: any(name.startswith("encoder.") for name in names),
    lambda names: {name: name for name in names},
    lambda names: {name: name for name in names},
)

# In the order in which detect asks them: a plain ViT encoder is timm's unless someone's mark is on it.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        *(VQKD, SIMMIM, *TRANSFORMERS, OURS, DALLE, MAE, BEIT2, BEIT, TIMM_BEIT),
        *(DEIT, DEIT_STEM, MINI_DEIT, IRPE, MINI_SWIN, TIMM_SWIN, SWIN, TIMM_HIERARCHICAL),
        *(CPVT, PVT, PEG_ALONE, DEEPVIT, HDVW_CONVIT, HDVW, TIMM),
    )
}


def detect(names: Iterable[str]) -> Layout:
    """The layout these names are in. Raises ConfigError when they are no Vision Transformer's.

    An encoder without LayerScale is called the same by MAE, DeiT and timm; it is reported as timm's.
    """
    listed = set(names)
    for layout in LAYOUTS.values():
        if layout.owns(listed):
            return layout
    raise ConfigError(
        "run.init",
        sorted(listed)[:4],
        "these weights are in no known layout",
        f"give a run folder, or weights named as one of {sorted(LAYOUTS)} (see `halfseen convert --help`)",
    )
