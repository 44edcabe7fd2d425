"""Image sets to batches: one worker makes a whole micro-batch; round robin over workers keeps the order."""

import atexit
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from halfseen.config import Data
from halfseen.data.decode import decode
from halfseen.data.hashing import generator
from halfseen.data.ledger import BadRecord, Ledger, TooManyBad
from halfseen.data.plan import Order, Plan
from halfseen.data.reader import BadSample, Reader, Sample
from halfseen.data.sources import ImageSet
from halfseen.data.transforms import Transform
from halfseen.derived import Batches

ATTEMPTS = 64  # replacements tried for one position before the set itself is declared unusable
Views = Tensor | tuple[Tensor, Tensor]  # uint8 [3, H, W], or the same crop in two sizes
DrawMask = Callable[[Sequence[int]], Tensor]  # positions -> bool [B, N]; must pickle where workers are not forked
_BAD = "bad records"  # travels with a batch from worker to rank, never further


def make_plan(images: ImageSet, data: Data, seed: int) -> Plan:
    """The order of training samples."""
    return Plan(
        [source.counts for source in images.sources],
        [source.weight for source in images.sources],
        seed=seed,
        chunk=data.chunk,
        window=data.window,
        lanes=data.lanes,
        repeats=data.repeats,
    )


@dataclass(frozen=True)
class Share:
    """Which positions a rank's n-th micro-batch holds: those with position mod world == rank."""

    start: int
    batches: Batches
    rank: int

    def positions(self, number: int) -> np.ndarray:
        """int64 [micro] positions of micro-batch ``number``."""
        step, part = divmod(number, self.batches.accumulation)
        first = self.start + step * self.batches.total
        first += (self.rank - first) % self.batches.world
        slots = np.arange(part * self.batches.micro, (part + 1) * self.batches.micro, dtype=np.int64)
        return first + self.batches.world * slots


@dataclass
class Images:
    """Reads, decodes and transforms samples; holds the process's reader."""

    images: ImageSet
    data: Data
    transform: Transform | None  # None: hand out undecoded bytes
    seed: int
    reader: Reader | None = field(default=None, repr=False)
    process: int = 0

    def one(self, source: int, shard: int, sample: int, position: int) -> tuple[Sample, Views | None]:
        """A sample and its transformed image, or two views of it; None without a transform. Raises BadSample."""
        if self.reader is None or self.process != os.getpid():  # descriptors are opened after the fork
            self.reader, self.process = Reader(self.images, keep=self.transform is None), os.getpid()
        content = self.reader.read(source, shard, sample)
        if self.transform is None:
            return content, None
        try:
            image = decode(content.data, self.data.max_pixels, self.data.decode)
        except BadSample as bad:
            raise BadSample(bad.reason, content.shard, content.key, content.offset) from bad
        return content, self.transform(image, generator(self.seed, position, "augment"))

    def collate(self, rows: Sequence[tuple[Sample, Views | None]], positions: Sequence[int]) -> dict[str, Any]:
        """A batch of what ``one`` gave since the last call."""
        batch: dict[str, Any] = {
            "position": torch.tensor(positions, dtype=torch.int64),
            "key": [content.key for content, _ in rows],
        }
        if self.images.labelled:
            batch["label"] = torch.tensor([content.label for content, _ in rows], dtype=torch.int64)
        if self.transform is None:
            begins = [(content.place, content.place + len(content.data)) for content, _ in rows]
            batch["span"] = torch.tensor(begins, dtype=torch.int64).view(-1, 2)
            batch["data"] = torch.from_numpy(self.reader.take() if self.reader else np.empty(0, np.uint8))
            return batch
        pictures = [image if isinstance(image, tuple) else (image,) for _, image in rows if image is not None]
        size = self.data.image_size
        views = zip(*pictures) if pictures else [()]
        for name, view in zip(("image", "view"), views):
            batch[name] = torch.empty((len(view), *(view[0].shape if view else (3, size, size))), dtype=torch.uint8)
            for row, image in enumerate(view):
                batch[name][row].copy_(image)
        return batch


class TrainingBatches(Dataset[dict[str, Any]]):
    """Micro-batch number -> batch; bad samples are replaced, with a record of each."""

    def __init__(self, images: Images, plan: Plan, share: Share, mask: DrawMask | None = None) -> None:
        self.images, self.plan, self.share, self.mask = images, plan, share, mask

    def __getitem__(self, number: int) -> dict[str, Any]:
        positions = self.share.positions(number)
        records: list[BadRecord] = []
        places = zip(*(part.tolist() for part in self.plan.locate(positions)), positions.tolist())
        rows = [self._good(records, *place) for place in places]
        drawn = {"mask": self.mask(positions.tolist())} if self.mask is not None else {}
        return {**self.images.collate(rows, positions.tolist()), **drawn, _BAD: records}

    def _good(
        self, records: list[BadRecord], source: int, shard: int, sample: int, position: int
    ) -> tuple[Sample, Views | None]:
        for attempt in range(ATTEMPTS):
            try:
                return self.images.one(source, shard, sample, position)
            except BadSample as bad:
                records.append(BadRecord(position, attempt, bad.shard, bad.key, bad.offset, bad.reason))
                shard, sample = self.plan.replacement(source, position, attempt)
        raise TooManyBad(
            f"{ATTEMPTS} samples in a row are bad at position {position}. Last: {records[-1].words()}. "
            "Run `halfseen shards check` on the shards, and see that data.label says where their labels are."
        )


class EvaluationBatches(Dataset[dict[str, Any]]):
    """Batch number -> batch in natural order; a bad sample is left out, with a record of it."""

    def __init__(self, images: Images, rank: int, world: int, batch: int) -> None:
        self.images = images
        total = images.images.images
        positions = np.arange(rank, total, world, dtype=np.int64)
        # Every rank gets equally many batches, because engines that gather weights need all ranks at each
        # forward.
        most = -(-total // world)
        self.count = -(-most // batch)
        self.parts = np.array_split(positions, self.count)
        sources = images.images.sources
        self.ends = np.cumsum([int(source.counts.sum()) for source in sources])
        self.orders = [Order(source.counts, 0, 1, 1, 1) for source in sources]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows, good, records = [], [], list[BadRecord]()
        for position in self.parts[number].tolist():
            source = int(np.searchsorted(self.ends, position, side="right"))
            local = position - (int(self.ends[source - 1]) if source else 0)
            shard, sample = self.orders[source].natural(np.array([local]))
            try:
                rows.append(self.images.one(source, int(shard[0]), int(sample[0]), position))
                good.append(position)
            except BadSample as bad:
                records.append(BadRecord(position, 0, bad.shard, bad.key, bad.offset, bad.reason))
        return {**self.images.collate(rows, good), "left_out": len(records), _BAD: records}


class Endless(Sampler[int]):
    """0, 1, 2, ... for ever."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def _start_worker(_: int) -> None:
    # A signal to the whole process group asks the run to save and stop; the step under way still needs its data.
    # Workers end when the rank closes the loader, or when they find it gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _spare_once)
    torch.set_num_threads(1)


def _spare_once(*_: Any) -> None:
    # The next SIGTERM ends the worker: a rank that dies of an error stops its workers that way at exit.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_is(batch: Any) -> Any:
    # The default converts numpy arrays, and for that walks through every list of every batch.
    return batch


def _load(dataset: Dataset[dict[str, Any]], sampler: Any, data: Data, pin: bool) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset hands out whole micro-batches
        sampler=sampler,
        num_workers=data.workers,
        prefetch_factor=data.prefetch if data.workers else None,
        pin_memory=pin,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
    )


def train_batches(
    image_set: ImageSet,
    data: Data,
    transform: Transform | None,
    *,
    seed: int,
    start: int,
    plan: Batches,
    rank: int,
    ledger: Path | None = None,
    pin: bool = False,
    mask: DrawMask | None = None,
    images: type[Images] = Images,
) -> Iterator[dict[str, Any]]:
    """Endless micro-batches of this rank from position ``start`` on.

    Each: image uint8 [B, 3, S, S], position int64 [B], key list[str], label int64 [B] when the set is labelled, view
    uint8 [B, 3, S', S'] where the transform makes two of each image. Over all ranks, plan.accumulation micro-batches
    hold exactly the next plan.total positions. ledger: where bad samples are written; TooManyBad is raised above
    data.bad_limit. transform None: ``data`` (list of bytes) instead of image. mask: also draw ``mask`` here, from the
    positions: for masks that would keep the training process busy. images: what reads a sample, e.g. data.pairs.Pairs.
    """
    order = make_plan(image_set, data, seed)
    dataset = TrainingBatches(images(image_set, data, transform, seed), order, Share(start, plan, rank), mask)
    return _recorded(_load(dataset, Endless(), data, pin), Ledger(ledger, data.bad_limit, start))


def reading(image_set: ImageSet, data: Data, seed: int, plan: Batches) -> Callable[[int, int, int], str]:
    """A function of (rank, position, n): what that rank reads for its n-th micro-batch of the step there, in words.

    Pure arithmetic, so one rank can say it of another that does not answer.
    """

    def words(rank: int, position: int, number: int) -> str:
        positions = Share(position, plan, rank).positions(number)
        samples: dict[str, list[int]] = {}
        for source, shard, sample in zip(*make_plan(image_set, data, seed).locate(positions)):
            samples.setdefault(image_set.sources[source].shards[shard].name, []).append(int(sample))
        named = [f"{name} (samples {', '.join(map(str, sorted(found)[:8]))})" for name, found in samples.items()]
        more = f" and {len(named) - 8} more shards" if len(named) > 8 else ""
        return f"images {positions[0]:,} to {positions[-1]:,}: {'; '.join(named[:8])}{more}"

    return words


def evaluation_batches(
    image_set: ImageSet,
    data: Data,
    transform: Transform | None,
    *,
    rank: int,
    world: int,
    batch: int,
    ledger: Path | None = None,
    pin: bool = False,
    images: type[Images] = Images,
) -> Iterator[dict[str, Any]]:
    """Every image of a set once over all ranks, in natural order; this rank: position mod world == rank.

    No padding: sum counts and hits over ranks for exact figures. All ranks get the same number of batches;
    one is empty (image uint8 [0, 3, S, S], position int64 [0]) only where a rank has fewer images than batches,
    or all of it was bad. Bad samples are left out and recorded; ``left_out`` is their number in a batch.
    """
    dataset = EvaluationBatches(images(image_set, data, transform, 0), rank, world, batch)
    return _recorded(_load(dataset, range(len(dataset)), data, pin), Ledger(ledger, data.bad_limit))


class _Running:
    """A loader's iterator that can be let go of from outside, which stops its worker processes."""

    def __init__(self, loader: DataLoader[dict[str, Any]]) -> None:
        self.iterator: Iterator[dict[str, Any]] | None = iter(loader)

    def stop(self) -> None:
        """Drop the iterator; the last reference stops the workers and waits for them."""
        self.iterator = None


def _recorded(loader: DataLoader[dict[str, Any]], ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Batches without their bad records, which go to the ledger as the batch is handed out."""
    running, consumed = _Running(loader), 0
    # When an error ends the program, its traceback keeps this generator alive until after Python's own exit has begun
    # to wait for the workers -- which spare themselves at a signal. So they are stopped before that.
    atexit.register(running.stop)
    try:
        while running.iterator is not None:
            batch = next(running.iterator, None)
            if batch is None:
                return
            records = batch.pop(_BAD)
            consumed += len(batch["key"]) + sum(record.attempt == 0 for record in records)
            ledger.record(records, consumed)
            yield batch
    finally:
        atexit.unregister(running.stop)
        running.stop()
