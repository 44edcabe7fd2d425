"""Image shards to batches: index, plan (order arithmetic), reader, decode, transforms, masks, loader."""

from halfseen.data.loader import evaluation_batches, reading, train_batches
from halfseen.data.sources import ImageSet, open_set

__all__ = ["ImageSet", "evaluation_batches", "open_set", "reading", "train_batches"]
