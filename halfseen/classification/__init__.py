"""Supervised classification: what fine-tuning and distillation share. The data section's labels are the classes."""

from .classifier import Classifier
from .task import Task

__all__ = ["Classifier", "Task"]
