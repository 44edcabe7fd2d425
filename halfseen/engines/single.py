"""One process, one device."""

from torch import nn

from .base import Engine


class Single(Engine):
    """The plain step, and the reference the other engines are tested against."""

    name = "single"

    def place(self, student: nn.Module) -> nn.Module:
        """Move the student to the device."""
        return student.to(self.world.device)
