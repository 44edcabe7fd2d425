"""``halfseen bench data``: index, bytes, decode, loader, resume; next to WebDataset, Pillow and torchvision.

Every pair is measured in the same run, turn by turn, on the same shards; figures are medians over the turns.
One-process figures are CPU seconds, so that a busy machine disturbs them little; figures with worker
processes are wall seconds.
"""

import argparse
import io
import itertools
import json
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from webdataset import WebDataset
from webdataset.shardlists import split_by_worker
from webdataset.writer import ShardWriter as StockWriter

from halfseen import receipt
from halfseen.config import Augment, Data, Source
from halfseen.data import index as indexes
from halfseen.data import open_set, train_batches
from halfseen.data.decode import decode
from halfseen.data.hashing import generator
from halfseen.data.loader import make_plan
from halfseen.data.plan import Plan
from halfseen.data.reader import Reader
from halfseen.data.transforms import crop_box, pretrain_transform
from halfseen.data.writer import ShardWriter
from halfseen.derived import Batches

from .terminal import console, progress

BATCH = 64
SIZE = 224
AUGMENT = Augment()
HEIGHT, WIDTH = 375, 500
BYTES = 90_000  # of one picture, about ImageNet's mean
SHUFFLE = 1000  # samples in WebDataset's buffer, as its documentation has it


@dataclass
class Row:
    """One measured pair. A unit of images/s is better when larger, the others when smaller."""

    name: str
    unit: str
    ours: float
    stock: float | None = None
    stock_name: str = ""
    bar: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better ours is."""
        if self.stock is None:
            return None
        return self.ours / self.stock if self.unit.startswith("images/s") else self.stock / self.ours


# --------------------------------------------------------------------------------------------------- pictures


def noise_picture(rng: np.random.Generator) -> np.ndarray:
    """A uint8 [HEIGHT, WIDTH, 3] picture with the 1/f spectrum of photographs and correlated channels."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :]
    amplitude = 1.0 / np.maximum(np.hypot(rows, columns), 1.0 / WIDTH)
    field = []
    for _ in range(3):
        phase = rng.normal(size=amplitude.shape) + 1j * rng.normal(size=amplitude.shape)
        plane = np.fft.irfft2(amplitude * phase, s=(HEIGHT, WIDTH))
        field.append(plane / plane.std())
    luma, red, blue = field
    mixed = np.stack([luma + 0.4 * red, luma, luma + 0.4 * blue], -1)
    return np.clip(mixed * 55 + 120, 0, 255).astype(np.uint8)


def quality_for(picture: np.ndarray) -> int:
    """The JPEG quality (4:2:0) that comes nearest to BYTES."""
    sizes = [(abs(len(simplejpeg.encode_jpeg(picture, q, "RGB", "420")) - BYTES), q) for q in range(80, 99, 2)]
    return min(sizes)[1]


def make_shards(folder: Path, samples: int, distinct: int = 24) -> float:
    """Write ``samples`` pictures (shifted copies of a few) in shards of 200, twice; returns mean bytes of one.

    folder/stock: by webdataset's ShardWriter as it comes, whose fractional mtime gives each member a 1 KB extra header.
    folder/plain: by ours, without those. Both loaders read the same files.
    """
    rng = np.random.default_rng(0)
    bases = [noise_picture(rng) for _ in range(min(distinct, samples))]
    qualities = [quality_for(base) for base in bases]
    total = 0
    for kind in ("stock", "plain"):
        (folder / kind).mkdir()
    with StockWriter(str(folder / "stock" / "bench-%04d.tar"), maxcount=200, verbose=0) as stock:
        for first in progress(range(0, samples, 200), "making shards", -(-samples // 200)):
            with ShardWriter(folder / "plain" / f"bench-{first // 200:04d}.tar") as plain:
                for number in range(first, min(first + 200, samples)):
                    base, shift = number % len(bases), number // len(bases) * 16
                    picture = np.ascontiguousarray(np.roll(bases[base], (shift, 2 * shift), (0, 1)))
                    data = simplejpeg.encode_jpeg(picture, qualities[base], "RGB", "420")
                    members = {"jpg": data, "cls": str(number % 10).encode()}
                    plain.write(f"{number:06d}", members)
                    stock.write({"__key__": f"{number:06d}", **members})
                    total += len(data)
    return total / samples


# ---------------------------------------------------------------------------------------------------- timing


def interleaved(repeats: int, clock: Callable[[], float], *works: Callable[[], int]) -> list[float]:
    """Median seconds per image of each work, measured in turns. work() does its part and returns how many images."""
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()  # warm caches
    for turn in range(repeats):
        for number in range(len(works)) if turn % 2 else reversed(range(len(works))):
            start = clock()
            images = works[number]()
            seconds[number].append((clock() - start) / images)
    return [statistics.median(each) for each in seconds]


def consume(batches: Iterator[Any], count: int, size: Callable[[Any], int]) -> int:
    """Take batches until ``count`` images came; returns how many did."""
    taken = 0
    for batch in batches:
        taken += size(batch)
        if taken >= count:
            break
    return taken


# -------------------------------------------------------------------------------------------------- the pairs


def bench_index(paths: list[Path], repeats: int) -> Row:
    """Parsing headers over mmap, against tarfile."""

    def ours() -> int:
        return sum(len(indexes.build(path)) for path in paths)

    def stock() -> int:
        members = 0
        for path in paths:
            with tarfile.open(path) as tar:
                members += sum(member.isreg() for member in tar)
        return members // 2

    a, b = interleaved(repeats, time.process_time, ours, stock)
    return Row("build an index", "us CPU/sample", a * 1e6, b * 1e6, "tarfile")


def stock_samples(folder: Path, shuffle: bool) -> Any:
    """WebDataset's pipeline of (jpg bytes, cls bytes); shuffle: with its usual buffer."""
    order: dict[str, Any] = {"shardshuffle": 100, "seed": 0} if shuffle else {"shardshuffle": False}
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = WebDataset(paths, workersplitter=split_by_worker, **order)
    if shuffle:
        pipeline = pipeline.shuffle(SHUFFLE)
    return pipeline.to_tuple("jpg", "cls")


def our_batches(folder: Path, workers: int, transform: Any, start: int = 0) -> Iterator[dict[str, Any]]:
    """Our loader over the same shards."""
    data = Data([Source(str(folder))], classes=10, workers=workers)
    split = Batches(BATCH, 1, BATCH, 1)
    return train_batches(open_set(data, "train"), data, transform, seed=0, start=start, plan=split, rank=0)


def bench_bytes(folder: Path, samples: int, repeats: int, shuffle: bool) -> Row:
    """An epoch of undecoded samples, each handed over and dropped, as a decoder gets them; ours always shuffled."""

    def ours() -> int:
        data = Data([Source(str(folder))], classes=10)
        images = open_set(data, "train")
        plan, reader, count = make_plan(images, data, 0), Reader(images), 0
        for first in range(0, samples, BATCH):
            places = plan.locate(np.arange(first, min(first + BATCH, samples)))
            for place in zip(*(part.tolist() for part in places)):
                count += len(reader.read(*place).data) > 0
        reader.close()
        return count

    def stock() -> int:
        return sum(len(data) > 0 and int(label) >= 0 for data, label in stock_samples(folder, shuffle))

    a, b = interleaved(repeats, time.process_time, ours, stock)
    order = f"shuffle({SHUFFLE})" if shuffle else "in file order"
    row = Row(
        f"read samples, {folder.name} headers", "images/s, one process, CPU", 1 / a, 1 / b, f"WebDataset, {order}"
    )
    if folder.name == "stock":
        row.bar, row.met = ">= 5x", b / a >= 5
    return row


def bench_loader(folder: Path, samples: int, repeats: int, workers: int) -> Row:
    """An epoch of training images through both loaders."""

    def ours() -> int:
        stream = our_batches(folder, workers, pretrain_transform(AUGMENT, SIZE))
        try:
            return consume(stream, samples, lambda batch: len(batch["key"]))
        finally:
            stream.close()  # type: ignore[attr-defined]

    def stock() -> int:
        pipeline = stock_samples(folder, shuffle=True).map(stock_training_sample)
        return consume(iter(DataLoader(pipeline, BATCH, num_workers=workers)), samples, lambda batch: len(batch[1]))

    clock = time.perf_counter if workers else time.process_time
    a, b = interleaved(repeats, clock, ours, stock)
    unit = f"images/s, {workers} workers, wall" if workers else "images/s, one process, CPU"
    return Row("whole loader", unit, 1 / a, 1 / b, f"WebDataset, shuffle({SHUFFLE}), Pillow + torchvision")


def stock_crop(data: bytes, rng: random.Random) -> Image.Image:
    """Pillow decode, torchvision's resized crop and flip, with the boxes our transform draws."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = crop_box(image.height, image.width, AUGMENT.crop_scale, AUGMENT.crop_ratio, rng)
    image = tvf.resized_crop(image, *box, [SIZE, SIZE], InterpolationMode.BICUBIC)
    return tvf.hflip(image) if rng.random() < AUGMENT.flip else image


def stock_training_sample(sample: tuple[bytes, bytes]) -> tuple[torch.Tensor, int]:
    """MAE's published recipe: to float and normalised in the worker."""
    image = tvf.to_tensor(stock_crop(sample[0], random.Random(len(sample[0]))))
    return tvf.normalize(image, list(AUGMENT.mean), list(AUGMENT.std)), int(sample[1])


def bench_decode(pictures: list[bytes], repeats: int) -> tuple[list[Row], float]:
    """Decode and crop on one core, the same crops; returns rows and the mean difference on the 0-255 scale."""
    transform = pretrain_transform(AUGMENT, SIZE)

    def ours() -> int:
        for number, data in enumerate(pictures):
            transform(decode(data), generator(0, number, "augment"))
        return len(pictures)

    def stock() -> int:
        for number, data in enumerate(pictures):
            tvf.pil_to_tensor(stock_crop(data, generator(0, number, "augment")))
        return len(pictures)

    def published() -> int:
        for number, data in enumerate(pictures):
            image = tvf.to_tensor(stock_crop(data, generator(0, number, "augment")))
            tvf.normalize(image, list(AUGMENT.mean), list(AUGMENT.std))
        return len(pictures)

    a, b, c = interleaved(repeats, time.process_time, ours, stock, published)
    difference = statistics.mean(
        float(
            (
                transform(decode(data), generator(0, number, "augment")).int()
                - tvf.pil_to_tensor(stock_crop(data, generator(0, number, "augment"))).int()
            )
            .abs()
            .float()
            .mean()
        )
        for number, data in enumerate(pictures)
    )
    met = b / a >= 2 and difference <= 0.1
    bar = f">= 2x at <= 0.1/255 (is {difference:.3f})"
    return [
        Row(
            "decode + crop, uint8 out",
            "images/s per core, CPU",
            1 / a,
            1 / b,
            "Pillow + torchvision",
            bar,
            met,
        ),
        Row(
            "... against float, normalised",
            "images/s per core, CPU",
            1 / a,
            1 / c,
            "MAE's published transform",
        ),
    ], difference


def bench_resume(folder: Path, samples: int, repeats: int, workers: int) -> list[Row]:
    """From nothing to the first batch at 90 % of an epoch; stock can only read and skip."""
    start = samples * 9 // 10

    def ours(processes: int) -> float:
        began = time.perf_counter()
        stream = our_batches(folder, processes, pretrain_transform(AUGMENT, SIZE), start)
        next(stream)
        taken = time.perf_counter() - began
        stream.close()  # type: ignore[attr-defined]
        return taken

    def stock() -> float:
        began = time.perf_counter()
        for sample in itertools.islice(stock_samples(folder, shuffle=False), start, start + BATCH):
            stock_training_sample(sample)
        return time.perf_counter() - began

    turns = [(ours(0), ours(workers), stock()) for _ in range(repeats)]
    alone, spread_out, skipped = (statistics.median(column) for column in zip(*turns))
    counts = np.full(1282, 1000)
    began = time.perf_counter()
    Plan([counts], seed=0).locate(np.arange(BATCH) + int(counts.sum()) * 9 // 10)
    planned = time.perf_counter() - began
    bar = "< 1 s"
    return [
        Row(
            "first batch at 90 %",
            "s, one process",
            alone,
            skipped,
            "WebDataset, read and skip",
            bar,
            alone < 1,
        ),
        Row("first batch at 90 %", f"s, {workers} workers", spread_out, None, "", bar, spread_out < 1),
        Row("plan and seek, 1.28 M images", "s", planned, None, "", bar, planned < 1),
    ]


# ---------------------------------------------------------------------------------------------------- report


def shown(row: Row) -> list[str]:
    """A row as text."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    bar = row.bar + ("" if row.met is None else "  met" if row.met else "  NOT met")
    return [row.name, row.unit, figure(row.ours), figure(row.stock), row.stock_name, ratio, bar]


def measure(folder: Path, samples: int, repeats: int, workers: int) -> tuple[list[Row], dict[str, float]]:
    """All pairs on freshly made shards."""
    mean_bytes = make_shards(folder, samples)
    stock, plain = folder / "stock", folder / "plain"
    batch = next(our_batches(plain, 0, None))
    pictures = [batch["data"][begin:end].numpy().tobytes() for begin, end in batch["span"].tolist()]
    rows = [bench_index(sorted(stock.glob("*.tar")), repeats)]
    for shards, shuffle in itertools.product((stock, plain), (True, False)):
        rows.append(bench_bytes(shards, samples, repeats, shuffle))
    decoded, difference = bench_decode(pictures, repeats)
    rows += decoded
    rows += [bench_loader(stock, samples, max(repeats // 2, 1), number) for number in sorted({0, workers})]
    rows += bench_resume(stock, samples, repeats, max(workers, 1))
    return rows, {"mean_bytes": mean_bytes, "mean_difference_of_255": difference}


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(prog="halfseen bench data", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--samples", type=int, default=1500, help="pictures of about 90 KB (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns per pair (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="of the multi-process rows; 0: none (default: %(default)s)"
    )
    arguments = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(Path(folder), arguments.samples, arguments.repeats, arguments.workers)
    table = Table("what", "unit", "ours", "stock", "stock is", "ratio", "bar")
    for row in rows:
        table.add_row(*shown(row))
    screen = console()
    screen.print(f"{arguments.samples} pictures of {WIDTH} x {HEIGHT}, {facts['mean_bytes'] / 1000:.0f} KB on average")
    screen.print(table)
    if arguments.json:
        names = ("halfseen", "torch", "torchvision", "webdataset", "pillow", "simplejpeg", "numpy")
        result = {
            "versions": {name: version(name) for name in names},
            "python": platform.python_version(),
            "device": receipt.processor(),
            "source": receipt.source(),
            "options": {
                "samples": arguments.samples,
                "repeats": arguments.repeats,
                "workers": arguments.workers,
            },
            **facts,
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
