"""Pictures with a class for every pixel: WebDataset samples of an image member and a mask member (PNG, one channel).

data.label names the mask's extension, e.g. seg.png. Order, exactly-once and replacing bad samples are the loader's:
it takes ``images=Pairs``.
"""

import io
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from .decode import decode
from .hashing import generator
from .loader import Images, Views
from .reader import BadLabel, BadSample, Reader, Sample
from .transforms import resize

NOTHING = 255  # the mask's value where no class is right or wrong


class PairReader(Reader):
    """A reader that keeps a sample's mask instead of turning it into a number."""

    mask = b""

    def _label(self, key: str, content: bytes | None) -> int:
        if content is None:
            raise BadLabel(f"no mask: member .{self.label_kind} is missing")
        self.mask = content
        return 0


@dataclass(frozen=True)
class JointCrop:
    """Picture and mask scaled, cropped and flipped alike; both squares of one size.

    scale: the shorter side of what the square is cut from, over the square's side; lowest and highest.
    """

    side: int
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def __call__(self, pair: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        """uint8 [4, H, W], the mask being the last channel -> uint8 [3, S, S] and [1, S, S]."""
        image, mask = pair[:3], pair[3:]
        _, height, width = image.shape
        factor = self.side / min(height, width) * rng.uniform(*self.scale)
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        image, mask = resize(image, size), nearest(mask, size)
        below, right = (max(0, self.side - length) for length in size)
        if below or right:  # smaller than the square: black pixels of no class around it
            image, mask = F.pad(image, (0, right, 0, below)), F.pad(mask, (0, right, 0, below), value=NOTHING)
        top, left = (rng.randrange(length - self.side + 1) for length in image.shape[1:])
        image, mask = (part[:, top : top + self.side, left : left + self.side] for part in (image, mask))
        return (image.flip(2), mask.flip(2)) if rng.random() < self.flip else (image, mask)


@dataclass(frozen=True)
class ShortSide:
    """The whole picture with its shorter side at so many pixels, and its mask as it is: to be judged at full size."""

    side: int

    def __call__(self, pair: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        """uint8 [4, H, W], the mask being the last channel -> uint8 [3, h, w] with min(h, w) = side, and [1, H, W]."""
        _, height, width = pair.shape
        factor = self.side / min(height, width)
        size = (max(self.side, round(height * factor)), max(self.side, round(width * factor)))
        return resize(pair[:3], size), pair[3:]


def nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask uint8 [1, H, W] at another size; no value is made up."""
    return F.interpolate(mask[None].float(), size, mode="nearest-exact")[0].to(torch.uint8)


@dataclass
class Pairs(Images):
    """Reads, decodes and transforms pictures with their masks, which batches hold as ``view`` uint8 [B, 1, S, S]."""

    def one(self, source: int, shard: int, sample: int, position: int) -> tuple[Sample, Views | None]:
        """A sample, and its picture and mask. Raises BadSample."""
        if self.reader is None or self.process != os.getpid():
            self.reader, self.process = PairReader(self.images), os.getpid()
        assert isinstance(self.reader, PairReader)
        assert self.transform is not None, "pairs are always cropped"
        content = self.reader.read(source, shard, sample)
        try:
            image = decode(content.data, self.data.max_pixels, self.data.decode)
            mask = decode_mask(self.reader.mask)
            if mask.shape[1:] != image.shape[1:]:
                raise BadSample(f"the mask has {tuple(mask.shape[1:])} pixels, the picture {tuple(image.shape[1:])}")
        except BadSample as bad:
            raise BadSample(bad.reason, content.shard, content.key, content.offset) from bad
        return content, self.transform(torch.cat([image, mask]), generator(self.seed, position, "augment"))

    def collate(self, rows: Sequence[tuple[Sample, Views | None]], positions: Sequence[int]) -> dict[str, Any]:
        """A batch; an empty one has an empty ``view`` too."""
        side = self.data.image_size
        empty = {} if rows else {"view": torch.empty(0, 1, side, side, dtype=torch.uint8)}
        return super().collate(rows, positions) | empty


def decode_mask(content: bytes) -> Tensor:
    """A mask file as uint8 [1, H, W]: the numbers in it, of a palette its indices. Raises BadSample."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.mode not in ("L", "P", "1"):
                raise BadSample(f"the mask is of mode {picture.mode}, not one channel of 8 bits")
            return torch.from_numpy(np.array(picture, dtype=np.uint8))[None]
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise BadSample(f"the mask cannot be decoded: {error}") from error
