"""Mixup, CutMix and random erasing on the device, as functions of (seed, position) alone.

Positions are cut into blocks of 2 x stride. The image at p is mixed with the one half a block away, and all
images of a block share one draw (mixup or CutMix, weight, box), as the images of a batch do in timm. Rank r
of W holds the positions p with p mod W = r, in ascending order, so if W divides the stride and 2 x stride
divides the images of a micro-batch over all ranks, both images of every pair are in the same micro-batch of
the same rank, and what is mixed with what cannot depend on the split. Any other split is refused. The price
is one gather on the device; no image is read twice and no rank talks to another.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfseen.config import Augment, ConfigError
from halfseen.data.hashing import generator, mix, mix_tensor, purpose
from halfseen.derived import Batches

Box = tuple[int, int, int, int]  # top, bottom, left, right; bottom and right excluded
NOTHING: Box = (0, 0, 0, 0)
WIDEST = 64  # stride chosen for large batches: blocks of 128 images, for up to 64 ranks


# ------------------------------------------------------------------------------------------- pairing


def resolve_stride(global_batch: int, asked: int) -> int:
    """The stride of a run: the one asked for, else the largest power of two up to 64 that fits the batch."""
    if asked:
        return asked
    if global_batch % 2:
        raise ConfigError(
            "run.global_batch",
            global_batch,
            "is odd, so its images cannot be mixed in pairs",
            "use an even number",
        )
    stride = WIDEST
    while global_batch % (2 * stride):
        stride //= 2
    return stride


def check_split(stride: int, batches: Batches, repeats: int) -> None:
    """Refuse a split in which some pair would lie in two micro-batches, or would be one image twice."""
    micro, world = batches.micro, batches.world
    if stride % world == 0 and (micro * world) % (2 * stride) == 0 and stride >= repeats:
        return
    halves = [half for half in range(micro // 2, 0, -1) if micro % (2 * half) == 0]
    whole = [world * half for half in halves if world * half >= repeats]
    if whole:
        fix = (
            f"for a new run use one of {whole[:4]}; for this one, ranks that divide "
            f"{stride} and a run.micro_batch such that {2 * stride} divides ranks x micro-batch"
        )
    else:
        fix = "use a larger, even run.micro_batch, or augment.mixup=0 augment.cutmix=0"
    raise ConfigError(
        "task.mix_stride",
        stride,
        f"mixup and cutmix pair images {stride} positions apart; with {world} ranks x {micro} images per "
        f"micro-batch and data.repeats={repeats} some pairs would be split",
        fix,
    )


@dataclass(frozen=True)
class Mix:
    """How the images of one micro-batch are mixed; tensors on one device."""

    partner: Tensor  # int64 [B]: row of the other image
    label: Tensor  # float32 [B]: share of the own label
    pixel: Tensor  # float32 [B]: share of the own pixels outside the box
    box: Tensor  # int64 [B, 4]: where pixels come from the other image alone

    def to(self, device: torch.device) -> "Mix":
        """The same on another device."""
        move = (tensor.to(device, non_blocking=True) for tensor in (self.partner, self.label, self.pixel, self.box))
        return Mix(*move)


def draw(position: Tensor, *, seed: int, stride: int, augment: Augment, side: int) -> Mix:
    """Decide the mixing of a micro-batch on the host, where its positions come from.

    position: int64 [B] on the CPU. side: pixels S of the square images. Raises ValueError if a partner is
    missing, which ``check_split`` rules out.
    """
    offset = position % (2 * stride)
    wanted = position - offset + (offset + stride) % (2 * stride)
    ascending, order = position.sort()
    row = torch.searchsorted(ascending, wanted).clamp(max=len(position) - 1)
    if not torch.equal(ascending[row], wanted):
        missing = wanted[ascending[row] != wanted][0].item()
        raise ValueError(f"position {missing} is not in this micro-batch, but an image in it is to be mixed with it")
    blocks, block_of = torch.unique(position // (2 * stride), return_inverse=True)
    draws = [draw_block(seed, block, augment, side) for block in blocks.tolist()]
    label, pixel = (torch.tensor([entry[column] for entry in draws], dtype=torch.float32) for column in (0, 1))
    box = torch.tensor([entry[2] for entry in draws])
    return Mix(order[row], label[block_of], pixel[block_of], box[block_of])


def draw_block(seed: int, block: int, augment: Augment, side: int) -> tuple[float, float, Box]:
    """One block's draw: share of the own label, share of the own pixels outside the box, box.

    Mixup and CutMix as in timm: one weight from Beta(a, a); CutMix cuts a box of that share of the area
    around a uniform centre, and corrects the weight by what the border cut off.
    """
    rng = generator(seed, block, "mix")
    if rng.random() >= augment.mix_probability or not (augment.mixup or augment.cutmix):
        return 1.0, 1.0, NOTHING
    use_cutmix = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < augment.switch_probability)
    alpha = augment.cutmix if use_cutmix else augment.mixup
    weight = rng.betavariate(alpha, alpha)
    if not use_cutmix:
        return weight, weight, NOTHING
    length = int(side * math.sqrt(1 - weight))
    middle_y, middle_x = rng.randrange(side), rng.randrange(side)
    top, left = max(middle_y - length // 2, 0), max(middle_x - length // 2, 0)
    bottom, right = min(middle_y + length // 2, side), min(middle_x + length // 2, side)
    return 1 - (bottom - top) * (right - left) / side**2, 1.0, (top, bottom, left, right)


# ------------------------------------------------------------------------------------------- mixing


def mix_images(image: Tensor, mixed: Mix) -> Tensor:
    """Mix float images [B, 3, S, S] with their partners."""
    inside = inside_box(mixed.box, image.shape[-2], image.shape[-1])
    own = mixed.pixel[:, None, None, None] * ~inside
    return image * own + image[mixed.partner] * (1 - own)


def mix_targets(target: Tensor, mixed: Mix) -> Tensor:
    """Mix targets [B, K] with their partners'."""
    own = mixed.label[:, None]
    return target * own + target[mixed.partner] * (1 - own)


def soft_targets(label: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels int64 [B] to smoothed one-hot targets float32 [B, K]: the rows sum to one."""
    target = torch.full((len(label), classes), smoothing / classes, device=label.device)
    return target.scatter_(1, label[:, None], 1 - smoothing + smoothing / classes)


def inside_box(box: Tensor, height: int, width: int) -> Tensor:
    """Boxes int64 [B, 4] to bool [B, 1, H, W]."""
    top, bottom, left, right = box[:, :, None].unbind(1)
    row, column = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# ------------------------------------------------------------------------------------------- erasing


def erase(image: Tensor, position: Tensor, *, seed: int, probability: float) -> Tensor:
    """Random erasing with pixel noise: one box of 2 to 33 % of the area is filled with N(0, 1), as timm's
    `pixel` mode.

    image: float [B, 3, S, S] normalised, on any device. position: int64 [B] on the CPU. Returns a new tensor,
    or ``image`` itself where nothing is erased.
    """
    height, width = image.shape[-2:]
    drawn = [draw_erasure(seed, place, probability, height, width) for place in position.tolist()]
    rows = [row for row, box in enumerate(drawn) if box != NOTHING]
    if not rows:
        return image
    row = torch.tensor(rows).to(image.device, non_blocking=True)
    inside = inside_box(torch.tensor([drawn[row] for row in rows]).to(image.device, non_blocking=True), height, width)
    where = position[rows].to(image.device, non_blocking=True)
    noise = normal(seed, where, math.prod(image.shape[1:]), "erase noise").view(-1, *image.shape[1:])
    return image.index_copy(0, row, torch.where(inside, noise.to(image.dtype), image[row]))


def draw_erasure(seed: int, position: int, probability: float, height: int, width: int) -> Box:
    """Where one image is erased; an empty box for most. Up to ten tries to fit a drawn shape, as in timm."""
    rng = generator(seed, position, "erase")
    if rng.random() >= probability:
        return NOTHING
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
            return top, top + tall, left, left + wide
    return NOTHING


def normal(seed: int, positions: Tensor, count: int, name: str) -> Tensor:
    """Standard normal numbers that depend on (seed, position, column) alone (Box and Muller).

    positions: int64 [B], on any device. Returns float32 [B, count] there; devices agree to rounding of log
    and cos.
    """
    columns = torch.arange(count, device=positions.device)
    words = mix_tensor(mix(seed, purpose(name)), positions[:, None], columns[None, :])
    first, second = ((words >> shift & 0xFFFFFF).float() * 2.0**-24 for shift in (40, 16))
    return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)
