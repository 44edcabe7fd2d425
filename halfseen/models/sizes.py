"""The registry of trunk sizes, and how a config's overrides become one size."""

from dataclasses import dataclass, replace

from halfseen.config import ConfigError, Model


@dataclass(frozen=True)
class Size:
    """Width D, depth L (blocks applied), heads H, patch side P, hidden width of the MLP over D."""

    width: int
    depth: int
    heads: int
    patch: int = 16
    mlp_ratio: float = 4.0

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return round(self.width * self.mlp_ratio)


SIZES: dict[str, Size] = {
    "ti": Size(192, 12, 3),
    "s": Size(384, 12, 6),
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
    "h": Size(1280, 32, 16, patch=14),
    "g": Size(1408, 40, 16, patch=14, mlp_ratio=6144 / 1408),
}


def resolve(model: Model) -> Size:
    """The size a config asks for: the named one with its overrides. ConfigError if it cannot be built."""
    names = ("width", "depth", "heads", "patch", "mlp_ratio")
    overrides = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    size = replace(SIZES[model.size], **overrides)
    if size.width % size.heads:
        legal = [heads for heads in range(1, size.width + 1) if size.width % heads == 0 and size.width // heads >= 16]
        raise ConfigError(
            "model.heads",
            size.heads,
            f"does not divide the width {size.width}",
            f"use one of {legal[:12]}, or another model.width",
        )
    groups_of(model, size.depth)
    return size


def groups_of(model: Model, depth: int) -> tuple[int, ...]:
    """How many consecutive blocks share their weights, group by group; they sum to depth. ConfigError otherwise."""
    if not model.groups:
        if depth % model.share:
            reason = f"does not divide the depth {depth}"
            raise ConfigError("model.share", model.share, reason, "use a divisor of model.depth, or model.groups")
        return (model.share,) * (depth // model.share)
    if min(model.groups) < 1 or sum(model.groups) != depth:
        reason = (
            f"sums to {sum(model.groups)}, not to the depth {depth}" if min(model.groups) > 0 else "has a group of 0"
        )
        raise ConfigError("model.groups", model.groups, reason, "say of every group how many blocks it has")
    if model.share != 1:
        raise ConfigError("model.share", model.share, "model.groups says it of every group", "use model.share=1")
    return tuple(model.groups)
