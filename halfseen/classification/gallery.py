"""A picture of the mistakes a classifier is surest of."""

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from halfseen.distributed import World

GAP, CAPTION = 4, 14  # pixels


class Gallery:
    """The mistakes a classifier is surest of, as a picture: each image with what it is and what it was taken for."""

    def __init__(self, most: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.most, self.mean, self.std = most, mean, std
        self.worst: list[tuple[float, int, Tensor, int, int]] = []  # a heap: confidence, number, image, right, named

    def __call__(self, batch: dict[str, Any], probability: Tensor, right: Tensor) -> None:
        confidence, named = probability.max(-1)
        wrong = right.any(-1) & ~right.gather(1, named[:, None])[:, 0]
        for row in wrong.nonzero()[:, 0].tolist():
            entry = (float(confidence[row]), int(batch["position"][row]), batch["image"][row].cpu())
            heapq.heappush(self.worst, (*entry, int(right[row].int().argmax()), int(named[row])))
            if len(self.worst) > self.most:
                heapq.heappop(self.worst)

    def gather(self, world: World) -> Tensor:
        """All ranks' worst as one picture uint8 [3, H, W]. Collective."""
        gathered = [entry for part in world.gather_object(self.worst) for entry in part]
        return sheet(sorted(gathered, reverse=True)[: self.most], self.mean, self.std)

    def picture(self) -> Tensor:
        """This rank's worst as one picture uint8 [3, H, W]."""
        return sheet(sorted(self.worst, reverse=True), self.mean, self.std)


def sheet(worst: Sequence[tuple[float, int, Tensor, int, int]], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pictures in rows of eight, captioned ``right > named``: uint8 [3, H, W]; one white pixel without any."""
    if not worst:
        return torch.full((3, 1, 1), 255, dtype=torch.uint8)
    _, height, width = worst[0][2].shape
    columns = min(8, len(worst))
    rows = -(-len(worst) // columns)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (_, _, image, right, named) in enumerate(worst):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + CAPTION + GAP)
        scale, shift = (image.new_tensor(values).view(3, 1, 1) for values in (std, mean))
        pixels = ((image * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
        canvas.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (left, top + CAPTION))
        draw.text((left, top), f"{right} > {named}", fill="black")
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(*canvas.size[::-1], 3).permute(2, 0, 1)
