"""What a frozen network said, on disk by position: made once by ``halfseen teach``, read by any number of runs.

What a network is shown at position P is a pure function of (seed, P), so its answer is stored under its position, with
a checksum of the sample's key to notice another sample there. A store is a folder:

    store.json                       what the answers depend on; a run that differs in any of it is refused
    positions-000000000000.tar       a WebDataset shard with an index beside it, published in one move

A sample of a shard is a block of consecutive positions, named by its first one. Its members are numpy arrays with a row
for each position: key (CRC-32 of the sample's key), and what the kind of store keeps (pretrain/distill/store.py: scores
and blocks of a teacher; pretrain/stored_codes.py: codes of a tokenizer). errors.json says what storing them lost.
"""

import io
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from halfseen.config import ConfigError, duration, positive
from halfseen.data import ImageSet
from halfseen.data import index as indexes
from halfseen.data.plan import Recent
from halfseen.data.writer import ShardWriter
from halfseen.derived import Batches

FORMAT = 1
DESCRIPTION = "store.json"
LOADED = ("teacher.digest", "tokenizer.digest", "tokenizer.codes")  # known, and compared, where the network is loaded
BLOCK = 256  # positions of a block, about: a multiple of what mixup pairs within


@dataclass
class StoreConfig:
    """Where a frozen network's answers are kept."""

    folder: str = ""  # a store made by `halfseen teach` with this recipe; empty: the network is asked at every step
    missing: Literal["stop", "live"] = "stop"  # a position that is not in it: stop, or ask the network
    shard_images: int = 16_384  # positions in a shard, rounded up to whole blocks
    images: str = ""  # duration to store, from position 0; empty: run.images
    repeat: bool = False  # after that many images (whole steps) show them again: same samples, crops, mixing and masks

    def check(self, key: str) -> None:
        """Ranges."""
        positive(f"{key}.shard_images", self.shard_images)
        if self.repeat and not (self.folder and self.images):
            reason = "nothing says after how many images the stored views come again"
            raise ConfigError(f"{key}.repeat", True, reason, f"set {key}.folder, and e.g. {key}.images=10ep")


def shard_name(first: int) -> str:
    """The shard that begins at a position."""
    return f"positions-{first:012d}.tar"


# ------------------------------------------------------------------------------------------------- length


def length_of(config: Any, cfg: StoreConfig, key: str, epoch: int) -> int:
    """Positions to store: whole steps. key: of the section; epoch: images of one."""
    given = (f"{key}.images", cfg.images) if cfg.images else ("run.images", config.run.images)
    batch = config.run.global_batch
    return -(-duration(*given, epoch=epoch, batch=batch) // batch) * batch


def period_of(config: Any, cfg: StoreConfig, key: str, epoch: int) -> int | None:
    """After how many images the views of a run come again; None: never."""
    return length_of(config, cfg, key, epoch) if cfg.repeat else None


Stream = Callable[[int], Iterator[dict[str, Any]]]


def repeated(stream: Stream, period: int | None, batches: Batches) -> Stream:
    """The micro-batches of a stream whose positions from ``period`` on are those from 0 on, again and again.

    period: a multiple of batches.total. Position P then holds what P mod period holds, so everything that follows from
    positions -- sample, crop, augmentation, mixing, mask -- is the same, too.
    """
    if period is None:
        return stream

    def from_position(start: int) -> Iterator[dict[str, Any]]:
        place = start % period
        while True:
            count = (period - place) // batches.total * batches.accumulation
            with closing(cast(Any, stream(place))) as views:
                yield from islice(views, count)
            place = 0

    return from_position


# ------------------------------------------------------------------------------------------------- fingerprint


def views_of(config: Any, train_set: ImageSet) -> dict[str, Any]:
    """Everything that decides which image is seen how at each position; plain values by option."""
    order = ("chunk", "window", "lanes", "repeats", "image_size", "decode")
    return {
        "format": FORMAT,
        "data": train_set.fingerprint,
        "seed": config.run.seed,
        **{f"data.{name}": getattr(config.data, name) for name in order},
        **{f"augment.{name}": value for name, value in asdict(config.augment).items()},
    }


def described_in(folder: Path, key: str) -> dict[str, Any]:
    """What a store says of itself. key: of the option that names it."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ConfigError(key, str(folder), "holds no store", "make it: halfseen teach RECIPE, same options")
    return json.loads(path.read_text())


def refuse_other(folder: Path, described: Mapping[str, Any], key: str = "store.folder") -> None:
    """Raise ConfigError naming the first thing in which a store differs from what a run would ask."""
    stored, wanted = described_in(folder, key), json.loads(json.dumps(described))
    unknown = {name for name in LOADED if name not in wanted}
    for name in sorted((stored.keys() | wanted.keys()) - unknown):
        if stored.get(name) != wanted.get(name):
            raise ConfigError(
                name if "." in name else key,
                wanted.get(name),
                f"the answers in {folder} were made with {stored.get(name)!r}: of other images, or by another network",
                f"use the same options, or another {key}",
            )


def create(folder: Path, described: Mapping[str, Any], key: str = "store.folder") -> None:
    """Make a store, or see that an existing one is of the same answers."""
    if (folder / DESCRIPTION).is_file():
        refuse_other(folder, described, key)
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{DESCRIPTION}.{os.getpid()}"
    temporary.write_text(json.dumps(described, indent=1) + "\n")
    os.replace(temporary, folder / DESCRIPTION)


# ------------------------------------------------------------------------------------------------- writing


def checksums(keys: Sequence[str]) -> np.ndarray:
    """CRC-32 of samples' keys, uint32."""
    return np.array([zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in keys], np.uint32)


def write_block(
    writer: ShardWriter, first: int, keys: Sequence[str], arrays: Mapping[str, np.ndarray], lost: Mapping[str, float]
) -> None:
    """Append the answers to len(keys) positions from ``first`` on, a row each, and what storing them loses."""
    members = {f"{name}.npy": as_bytes(array) for name, array in {**arrays, "key": checksums(keys)}.items()}
    writer.write(f"{first:012d}", members | {"errors.json": json.dumps(dict(lost)).encode()})


def as_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- reading


class Shard:
    """One shard, mapped: rows are read where they lie."""

    def __init__(self, path: Path) -> None:
        self.index = indexes.read(indexes.ensure(path)[0])
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def block(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a block, without copying them."""
        found = {}
        for extension, offset, size in self.index.members(number):
            if extension.endswith(".npy"):
                found[extension.removesuffix(".npy")] = self._array(offset, size)
        return found

    def errors(self, number: int) -> dict[str, float]:
        """What storing a block lost."""
        place = {extension: (offset, size) for extension, offset, size in self.index.members(number)}
        offset, size = place["errors.json"]
        return json.loads(self.data[offset : offset + size])

    def _array(self, offset: int, size: int) -> np.ndarray:
        head = io.BytesIO(self.data[offset : offset + min(size, 1024)])
        np.lib.format.read_magic(head)
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
        flat = np.frombuffer(self.data, dtype, int(np.prod(shape)), offset + head.tell())
        return flat.reshape(shape)


class Missing(LookupError):
    """A position whose answer is not in the store."""


class Stored:
    """Reads the arrays of a store by position."""

    def __init__(self, folder: Path, block: int, span: int, device: torch.device) -> None:
        """block, span: positions in a block and in a shard."""
        self.folder, self.block, self.span, self.device = folder, block, span, device
        self.shards, self.blocks = Recent(4), Recent(16)

    def rows(self, position: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """The arrays for positions int64 [B], on the CPU, whose samples have these keys. Raises Missing."""
        arrays = [self._row(place, check) for place, check in zip(position.tolist(), checksums(keys).tolist())]
        names = [name for name in arrays[0] if name != "key"]
        together = {name: torch.from_numpy(np.stack([row[name] for row in arrays])) for name in names}
        if self.device.type == "cuda":  # a large copy from memory that is not pinned waits for the device
            together = {name: tensor.pin_memory() for name, tensor in together.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in together.items()}

    def shard(self, first: int) -> Shard:
        """The shard that begins at a position. Raises Missing."""
        path = self.folder / shard_name(first)
        if not path.is_file():
            raise Missing(f"{path} is missing")
        return self.shards.get(first, lambda: Shard(path))

    def _row(self, position: int, check: int) -> dict[str, np.ndarray]:
        first = position // self.span * self.span
        number, row = divmod(position - first, self.block)
        shard = self.shard(first)
        if number >= len(shard.index):
            raise Missing(f"{shard_name(first)} ends before position {position}")
        arrays = self.blocks.get((first, number), lambda: shard.block(number))
        if int(arrays["key"][row]) != check:
            raise Missing(f"position {position} held another sample when the store was made: a bad one was replaced")
        return {name: array[row] for name, array in arrays.items()}

    def example(self) -> dict[str, Tensor]:
        """The arrays of any stored image, to see what is there, on the CPU. Raises Missing."""
        path = min(self.folder.glob("positions-*.tar"), default=None)
        if path is None:
            raise Missing(f"{self.folder} holds no shard")
        rows = {name: array[:1] for name, array in Shard(path).block(0).items() if name != "key"}
        return {name: torch.from_numpy(array.copy()) for name, array in rows.items()}

    def gaps(self, total: int) -> list[str]:
        """Shards that are missing of the first ``total`` positions."""
        names = (shard_name(first) for first in range(0, total, self.span))
        return [name for name in names if not (self.folder / name).is_file()]


def refuse_gaps(stored: Stored, total: int, cfg: StoreConfig, key: str) -> list[str]:
    """Shards that a run of ``total`` positions misses; ConfigError if there are some and cfg.missing is stop."""
    gaps = stored.gaps(total)
    if gaps and cfg.missing == "stop":
        reason = f"{len(gaps)} shards that the run needs are missing, the first is {gaps[0]}"
        fix = (
            f"make them with `halfseen teach`, train less (run.images), set {key}.missing=live, or show the stored "
            f"views again ({key}.repeat=true {key}.images=WHAT_IS_STORED)"
        )
        raise ConfigError(f"{key}.folder", cfg.folder, reason, fix)
    return gaps
