"""Which trunk a config means: ``trunk`` names a kind, and the section of that kind describes it."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from halfseen.config import Model

from .alternet import STRIDE, AlterNet, AlterNetConfig
from .hierarchical import TimmConfig, TimmTrunk, sides
from .pyramid import Pyramid, PyramidConfig
from .swin import Swin, SwinConfig
from .vit import ViT

Kind = Literal["vit", "swin", "timm", "alternet", "pyramid"]
Section = Model | SwinConfig | TimmConfig | AlterNetConfig | PyramidConfig
Trunk = ViT | Swin | TimmTrunk | AlterNet | Pyramid

# Kind -> the name of its section, and what it is.
SECTIONS: dict[str, tuple[str, type[Section]]] = {
    "vit": ("model", Model),
    "swin": ("swin", SwinConfig),
    "timm": ("timm", TimmConfig),
    "alternet": ("alternet", AlterNetConfig),
    "pyramid": ("pyramid", PyramidConfig),
}
KINDS = {kind: name for name, (_, kind) in SECTIONS.items()}


def section_of(config: Any) -> Section:
    """The section that describes the trunk of a stage's config."""
    return cast(Section, getattr(config, SECTIONS[config.trunk][0]))


def section_in(plain: Mapping[str, Any]) -> Section:
    """The same of a config as plain values, e.g. a run's config.yaml."""
    name, kind = SECTIONS[plain.get("trunk", "vit")]
    return cast(Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain[name])))


def build(section: Section, image_size: int) -> Trunk:
    """The trunk that a section describes, with random weights, on the CPU."""
    if isinstance(section, Model):
        return ViT(section, image_size)
    if isinstance(section, SwinConfig):
        return Swin(section, image_size)
    if isinstance(section, PyramidConfig):
        return Pyramid(section, image_size)
    return TimmTrunk(section, image_size) if isinstance(section, TimmConfig) else AlterNet(section, image_size)


def trunk_of(config: Any) -> Trunk:
    """The trunk of a stage's config."""
    return build(section_of(config), config.data.image_size)


def stride_of(section: SwinConfig | TimmConfig | AlterNetConfig | PyramidConfig, image_size: int) -> int:
    """Pixels on the side of a place of the last stage."""
    if isinstance(section, TimmConfig):
        return sides(section, image_size)[1]
    return section.stride if isinstance(section, SwinConfig | PyramidConfig) else STRIDE
