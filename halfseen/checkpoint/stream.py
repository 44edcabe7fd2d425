"""Tensors of a checkpoint one piece at a time: whoever copies a checkpoint never holds more than one of them."""

import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from halfseen.config import ConfigError


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor, and where in which file it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a checkpoint's files."""

    key: str  # model.NAME, buffer.NAME, optim.NAME.SLOT, ema.NAME, scaler.*
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]  # in the order of their offsets

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return self.count * self.dtype.itemsize


def stored(checkpoint: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by key; reads no numbers."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    places: dict[str, list[Piece]] = {}
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for index, place in metadata.storage_data.items():
        if getattr(place, "transform_descriptors", None):
            raise ConfigError("checkpoint", str(checkpoint), "its files are compressed", "use one halfseen wrote")
        if index.offset is not None:
            offsets = tuple(index.offset)
            piece = Piece(offsets, sizes[index.fqn, offsets], place.relative_path, place.offset, place.length)
            places.setdefault(index.fqn, []).append(piece)
    return {
        key: Stored(key, tuple(entry.size), entry.properties.dtype, tuple(sorted(places[key], key=_offsets)))
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def names(stored_keys: Iterable[str], part: Literal["model", "ema"]) -> dict[str, str]:
    """Name of each weight and saved buffer -> the key that holds it; ema: averaged where averages are kept."""
    keys = list(stored_keys)
    known = set(keys)
    found: dict[str, str] = {}
    for key in keys:
        kind, _, name = key.partition(".")
        if kind in ("model", "buffer"):
            found[name] = f"ema.{name}" if part == "ema" and f"ema.{name}" in known else key
    return found


def bands(checkpoint: Path, tensor: Stored) -> Iterator[Tensor]:
    """The tensor's numbers from first to last, as contiguous parts that follow each other in memory.

    A part is what one rank wrote where ranks divided the first axis, or the flattened tensor; another division is put
    together first.
    """
    if all(_in_a_row(piece, tensor) for piece in tensor.pieces):
        for piece in tensor.pieces:
            yield _read(checkpoint, piece)
        return
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for piece in tensor.pieces:
        place = tuple(slice(first, first + size) for first, size in zip(piece.offsets, piece.sizes))
        whole[place] = _read(checkpoint, piece)
    yield whole


def _in_a_row(piece: Piece, tensor: Stored) -> bool:
    """Whether the piece's numbers follow each other in the tensor: one index, then a range, then everything."""
    axis = next((axis for axis, size in enumerate(piece.sizes) if size != 1), len(piece.sizes))
    return piece.sizes[axis + 1 :] == tensor.shape[axis + 1 :]


def _offsets(piece: Piece) -> tuple[int, ...]:
    return piece.offsets


def _read(checkpoint: Path, piece: Piece) -> Tensor:
    with (checkpoint / piece.file).open("rb", buffering=0) as file:
        window = _Window(file, piece.start, piece.length)
        return torch.load(cast(BinaryIO, window), map_location="cpu", weights_only=True).contiguous()


class _Window(io.RawIOBase):
    """A part of a file that looks like a file of its own, as torch.load wants it."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move within the part."""
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        """Where in the part the next byte comes from."""
        return self.at

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the part goes."""
        left = memoryview(buffer)[: max(0, self.length - self.at)]
        self.file.seek(self.start + self.at)
        before = self.at
        # One read returns at most 2 GiB on Linux, and torch asks for a whole tensor at once.
        while left and (count := self.file.readinto(left)):  # type: ignore[attr-defined]
            self.at, left = self.at + count, left[count:]
        return self.at - before
