"""Crops, flips and colour on uint8 tensors, drawn per position; normalisation on the device."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from halfseen.config import Augment, ConfigError

Transform = Callable[[Tensor, random.Random], Any]  # uint8 [3, H, W] -> an image like that, or two views of one crop
Size = int | tuple[int, int]  # pixels: a square's side, or (height, width)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing, uint8 [3, H, W] -> uint8 [3, *size]; Pillow's result to within rounding."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop: ten draws of area and shape, then the centre."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return rng.randrange(height - h + 1), rng.randrange(width - w + 1), h, w
    if width / height < ratio[0]:
        w, h = width, min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w, h = min(width, max(1, round(height * ratio[1]))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


PADDING = 4  # reflected pixels around the image, for simple_crop


def simple_crop(image: Tensor, size: tuple[int, int], rng: random.Random) -> Tensor:
    """DeiT III's simple random crop: shorter side to the size, PADDING reflected pixels, a crop of the size.

    uint8 [3, H, W] -> uint8 [3, *size].
    """
    _, height, width = image.shape
    factor = max(size[0] / height, size[1] / width)
    scaled = resize(image, (max(size[0], int(height * factor + 1e-6)), max(size[1], int(width * factor + 1e-6))))
    padded = F.pad(scaled[None].float(), (PADDING,) * 4, mode="reflect")[0].to(torch.uint8)
    top, left = (rng.randrange(space - side + 1) for space, side in zip(padded.shape[1:], size))
    return padded[:, top : top + size[0], left : left + size[1]]


def three_augment(image: Tensor, rng: random.Random) -> Tensor:
    """3-Augment (DeiT III): greyscale, solarisation above 127, or Gaussian blur of radius 0.1 to 2, equally often.

    uint8 [3, H, W] -> the same.
    """
    choice = rng.randrange(3)
    if choice == 0:
        return grey(image).to(torch.uint8).expand(3, -1, -1)
    if choice == 1:
        return torch.where(image < 128, image, 255 - image)
    blur = ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).filter(blur)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _blend(image: Tensor, other: Tensor, share: float) -> Tensor:
    return (share * image.float() + (1.0 - share) * other).clamp_(0, 255).to(torch.uint8)


def grey(image: Tensor) -> Tensor:
    """Luma (ITU-R 601) of uint8 [3, H, W] as float [1, H, W], in whole steps as Pillow has it."""
    r, g, b = image.float().unbind(0)
    return (0.2989 * r + 0.587 * g + 0.114 * b).floor_()[None]


def colour_jitter(image: Tensor, strength: float, rng: random.Random) -> Tensor:
    """Brightness, contrast and saturation, each scaled by a factor of 1 +- strength, in random order.

    uint8 [3, H, W] -> the same.
    """
    names = ["brightness", "contrast", "saturation"]
    rng.shuffle(names)
    for name in names:
        share = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
        if name == "brightness":
            image = _blend(image, torch.zeros(()), share)
        elif name == "contrast":
            image = _blend(image, grey(image).mean(), share)
        else:
            image = _blend(image, grey(image), share)
    return image


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop, flip, optional colour jitter."""

    augment: Augment
    size: tuple[int, int]

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, *size]."""
        return self.finish(resize(self.crop(image, rng), self.size), rng)

    def crop(self, image: Tensor, rng: random.Random) -> Tensor:
        """uint8 [3, H, W] -> the crop [3, h, w] as it is in the image; the simple one is of the final size already."""
        if self.augment.simple_crop:
            return simple_crop(image, self.size, rng)
        scale, ratio = self.augment.crop_scale, self.augment.crop_ratio
        top, left, height, width = crop_box(image.shape[1], image.shape[2], scale, ratio, rng)
        return image[:, top : top + height, left : left + width]

    def finish(self, image: Tensor, rng: random.Random) -> Tensor:
        """Flip and colours: uint8 [3, H, W] -> the same."""
        if rng.random() < self.augment.flip:
            image = image.flip(2)
        if self.augment.three_augment:
            image = three_augment(image, rng)
        if self.augment.jitter:
            image = colour_jitter(image, self.augment.jitter, rng)
        return image


@dataclass(frozen=True)
class TwoViews:
    """One random crop in two sizes, flipped and coloured alike: the student's, and a tokenizer's."""

    first: RandomCrop
    second: tuple[int, int]

    def __call__(self, image: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] -> uint8 [3, *size] and [3, *second]."""
        crop = self.first.crop(image, rng)
        state = rng.getstate()
        view = self.first.finish(resize(crop, self.second), rng)
        rng.setstate(state)
        return self.first.finish(resize(crop, self.first.size), rng), view


@dataclass(frozen=True)
class Finetune:
    """Random crop, then timm's RandAugment where asked for."""

    crop: RandomCrop
    policy: Any = field(default=None)  # timm's RandAugment, or None

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, S, S]."""
        image = self.crop(image, rng)
        if self.policy is None:
            return image
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        with global_generators(rng):
            picture = self.policy(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@dataclass(frozen=True)
class CentreCrop:
    """Shorter side to a given length, then the centre."""

    size: tuple[int, int]
    shorter: int

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, *size]; draws nothing."""
        _, height, width = image.shape
        target_height, target_width = self.size
        # Never below the crop itself: a non-square crop may be longer than the shorter side.
        factor = max(self.shorter / min(height, width), target_height / height, target_width / width)
        scaled = (
            max(target_height, int(height * factor + 1e-6)),
            max(target_width, int(width * factor + 1e-6)),
        )
        image = resize(image, scaled)
        top, left = round((scaled[0] - target_height) / 2), round((scaled[1] - target_width) / 2)
        return image[:, top : top + target_height, left : left + target_width]


def pretrain_transform(augment: Augment, size: Size, second: Size | None = None) -> Transform:
    """Random resized crop, flip, optional jitter. size: pixels of the result. second: of another of the same crop."""
    crop = RandomCrop(augment, _pair(size))
    return crop if second is None else TwoViews(crop, _pair(second))


def finetune_transform(augment: Augment, size: Size) -> Transform:
    """As pretraining, then RandAugment. Erasing, mixup and cutmix happen on the device, not here."""
    policy = randaugment(augment, min(_pair(size))) if augment.randaugment else None
    return Finetune(RandomCrop(augment, _pair(size)), policy)


def evaluation_transform(size: Size, share: float | None = None) -> Transform:
    """Shorter side scaled so that the crop shows that share of it, then the centre.

    None: 224/256, and above 224 px all of it.
    """
    pair = _pair(size)
    side = min(pair)
    if share is None:
        return CentreCrop(pair, int(side * 256 / 224) if side <= 224 else side)
    return CentreCrop(pair, int(side / share))


# ------------------------------------------------------------------------------------------------ RandAugment


def randaugment(augment: Augment, side: int) -> Any:
    """timm's RandAugment for a config string, with its bicubic settings and a posterize guard."""
    from timm.data.auto_augment import rand_augment_transform

    text = augment.randaugment
    settings = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        policy = rand_augment_transform(text, settings)
    except (AssertionError, ValueError) as error:
        reason = f"timm does not understand it ({error})"
        raise ConfigError("augment.randaugment", text, reason, "e.g. rand-m9-mstd0.5-inc1") from error
    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return policy


def _at_least_one_bit(level: Callable[..., tuple[int, ...]], *arguments: Any) -> tuple[int, ...]:
    """At the highest levels timm asks Pillow to keep 0 bits, which Pillow 13 refuses: keep one."""
    return (max(1, level(*arguments)[0]),)


@contextmanager
def global_generators(rng: random.Random) -> Iterator[None]:
    """Drive the global Python and numpy generators, which timm draws from, by rng; then restore them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(rng.getrandbits(64))
    np.random.seed(rng.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


# ---------------------------------------------------------------------------------------------- on the device


@lru_cache(maxsize=16)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept, because making a tensor on a GPU from Python numbers waits for the device.
    spread = torch.tensor(std, dtype=torch.float64)
    shift = -torch.tensor(mean, dtype=torch.float64) / spread
    parts = ((1 / (255 * spread)), shift)
    scale, shift = (part.to(torch.float32).view(-1, 1, 1).to(device) for part in parts)
    return scale, shift


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, (image / 255 - mean) / std per channel, on the image's device."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), image.device)
    return torch.addcmul(shift, image.to(torch.float32), scale)
