"""``halfseen bench augment``: what each augmentation costs an image, in a loader's worker and on the training device.

Crop, RandAugment and 3-Augment run in workers, image by image, on uint8 pictures; erasing and mixing on the device, on
whole batches. The other way round is timed beside them: torchvision's RandAugment on the device, image by image (each
has its own operations), and erasing and mixing one image or pair at a time, as a worker would. Processor seconds on a
CPU, seconds on a GPU; jobs take turns, and the median counts.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from halfseen.classification import mixing
from halfseen.config import Augment
from halfseen.data.hashing import uniform
from halfseen.data.transforms import finetune_transform

SIDE, PICTURE = 224, (375, 500)  # pixels of the view, and of the decoded picture
PLAIN: dict[str, Any] = {"crop_scale": (0.08, 1.0)}
# Row -> options of the worker's transform.
WORKER: dict[str, dict[str, Any]] = {
    "crop, flip": {},
    "crop, flip, RandAugment": {"randaugment": "rand-m9-mstd0.5-inc1"},
    "crop, flip, 3-Augment, jitter": {"three_augment": True, "jitter": 0.3},
}


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="halfseen bench augment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a batch, a multiple of 4 (64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="training device")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    result = measure(arguments.batch, arguments.repeats, torch.device(arguments.device))
    for name, value in result["ms_per_image"].items():
        print(f"{name:<44}{value:>9.3f} ms/image")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(batch: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds per image of each job."""
    jobs = worker_jobs(batch) | device_jobs(batch, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            began = clock()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                found[name].append(1e3 * (clock() - began) / batch)
    return {
        "ms_per_image": {name: statistics.median(values) for name, values in found.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
        "batch": batch,
        "side": SIDE,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def worker_jobs(batch: int) -> dict[str, Callable[[], Any]]:
    """Each transform of a batch of pictures, one by one."""
    height, width = PICTURE
    pixels = uniform(0, torch.arange(8), 3 * height * width, "image").view(8, 3, height, width)
    pictures = (255 * pixels).to(torch.uint8)

    def job(options: dict[str, Any]) -> Callable[[], Any]:
        transform = finetune_transform(Augment(**PLAIN, **options), SIDE)
        return lambda: [transform(pictures[number % 8], random.Random(number)) for number in range(batch)]

    return {f"worker: {name}": job(options) for name, options in WORKER.items()}


def device_jobs(batch: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Erasing and mixing of a batch at once and piece by piece; RandAugment image by image."""
    position = torch.arange(batch)
    image = uniform(1, position, 3 * SIDE * SIDE, "image").view(-1, 3, SIDE, SIDE).to(device)
    bytes_ = (255 * image).to(torch.uint8)
    augment = Augment(mixup=0.8, cutmix=1.0)
    policy = v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)  # on tensors it has no bicubic turns

    def erase(rows: slice) -> Tensor:
        return mixing.erase(image[rows], position[rows], seed=0, probability=0.25)

    def blend(rows: slice) -> Tensor:
        mix = mixing.draw(position[rows], seed=0, stride=1, augment=augment, side=SIDE).to(device)
        return mixing.mix_images(image[rows], mix)

    whole = slice(0, batch)
    return {
        "batch: erasing": lambda: erase(whole),
        "one by one: erasing": lambda: [erase(slice(n, n + 1)) for n in range(batch)],
        "batch: mixup and CutMix": lambda: blend(whole),
        "pair by pair: mixup and CutMix": lambda: [blend(slice(n, n + 2)) for n in range(0, batch, 2)],
        "one by one: torchvision's RandAugment": lambda: [policy(picture) for picture in bytes_],
    }
