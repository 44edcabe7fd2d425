"""Checkpoints: one format for every engine and world size, published atomically, verified when read."""

from .checkpoints import Checkpoints
from .read import read_weights

__all__ = ["Checkpoints", "read_weights"]
