"""One process, one device."""

from torch import nn

from halfseen.config import ConfigError

from .base import Engine


class Single(Engine):
    """The plain step, and the reference the other engines are tested against."""

    name = "single"

    def place(self, student: nn.Module) -> nn.Module:
        """Move the student to the device."""
        if self.world.world > 1:
            raise ConfigError(
                "engine.name",
                "single",
                f"this run has {self.world.world} ranks",
                "use engine.name=auto, ddp or fsdp",
            )
        return student.to(self.world.device)
