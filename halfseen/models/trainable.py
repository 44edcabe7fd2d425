"""What a stage refuses of a ViT by its config alone, before a rank waits or a device is touched."""

from halfseen.config import ConfigError, Model

from .legality import check
from .sizes import resolve
from .vit import grid_of


def check_trainable(cfg: Model, image_size: int, recompute: bool) -> None:
    """Raise ConfigError for parts that cannot stand together, for such images, or be recomputed."""
    check(cfg)
    grid_of(image_size, resolve(cfg).patch)
    key, value, plain = ("norm", "power", "layer") if cfg.norm == "power" else ("attention", cfg.attention, "softmax")
    if recompute and value in ("power", "reattention"):
        raise ConfigError(
            "engine.recompute",
            True,
            f"model.{key}={value} keeps running statistics, which a second forward would move again",
            f"use engine.recompute=false, or model.{key}={plain}",
        )
