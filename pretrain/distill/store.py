"""The teacher's answers on disk: made once by ``halfseen teach``, read by any number of runs over the same views.

What a teacher sees at position P is a pure function of (seed, P), so an answer is stored under its position, with a
checksum of the sample's key to notice another sample there. A store is a folder:

    store.json                       what the answers depend on; a run that differs in any of it is refused
    positions-000000000000.tar       a WebDataset shard with an index beside it, published in one move

A sample of a shard is a block of consecutive positions, named by its first one. Its members are numpy arrays with a row
for each position: key (CRC-32 of the sample's key); scores.value, scores.class, scores.rest; and for every recorded
block qkv0, qkv1, ... and hidden0, ..., with NAME.scale where they are int8. errors.json says what storing them lost.
"""

import io
import json
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from halfseen.classification import mixing
from halfseen.config import ConfigError, at_least, positive
from halfseen.data import ImageSet
from halfseen.data import index as indexes
from halfseen.data.plan import Recent
from halfseen.data.writer import ShardWriter

FORMAT = 1
DIGEST = "teacher.digest"  # of its weights; known where the teacher is loaded, and then compared
DESCRIPTION = "store.json"
BLOCK = 256  # positions of a block, about: a multiple of what mixup pairs within


@dataclass
class StoreConfig:
    """Where the teacher's answers are kept, and how exactly."""

    folder: str = ""  # a store made by `halfseen teach` with this recipe; empty: the teacher is asked at every step
    missing: Literal["stop", "live"] = "stop"  # a position that is not in it: stop, or ask the teacher
    top: int = 0  # highest scores kept of each image, the rest as one number; 0: all
    tokens: Literal["fp16", "int8"] = "int8"  # type of recorded blocks; int8 has one scale per token
    shard_images: int = 16_384  # positions in a shard, rounded up to whole blocks
    images: str = ""  # duration to store, from position 0; empty: run.images

    def check(self, key: str) -> None:
        """Ranges."""
        at_least(f"{key}.top", self.top, 0)
        positive(f"{key}.shard_images", self.shard_images)


def block_of(config: Any) -> int:
    """Positions in a block: whole groups of images that are mixed with each other."""
    group = 2 * stride_of(config) or 1
    return -(-BLOCK // group) * group


def stride_of(config: Any) -> int:
    """Positions between an image and its partner in mixup and cutmix; 0: nothing is mixed."""
    if not (config.augment.mixup or config.augment.cutmix):
        return 0
    return mixing.resolve_stride(config.run.global_batch, config.task.mix_stride)


def span_of(config: Any) -> int:
    """Positions in a shard."""
    block = block_of(config)
    return -(-config.store.shard_images // block) * block


def shard_name(first: int) -> str:
    """The shard that begins at a position."""
    return f"positions-{first:012d}.tar"


# ------------------------------------------------------------------------------------------------- fingerprint


def describe(config: Any, train_set: ImageSet) -> dict[str, Any]:
    """Everything the answers depend on, and how they are kept. Two configs of equal descriptions share a store."""
    data, chosen, cfg = config.data, config.distillation, config.teacher
    order = {name: getattr(data, name) for name in ("chunk", "window", "lanes", "repeats", "image_size", "decode")}
    described = {
        "format": FORMAT,
        "data": train_set.fingerprint,
        "seed": config.run.seed,
        **{f"data.{name}": value for name, value in order.items()},
        **{f"augment.{name}": value for name, value in asdict(config.augment).items()},
        "task.mix_stride": stride_of(config),
        **{f"teacher.{name}": getattr(cfg, name) for name in ("source", "weights", "part", "image_size", "precision")},
        "distillation.scores": chosen.scores != "none",
        "distillation.teacher_layers": {"qkv": chosen.teacher.qkv, "hidden": chosen.teacher.hidden},
        **{f"store.{name}": getattr(config.store, name) for name in ("top", "tokens")},
        "store.shard_images": span_of(config),
    }
    return json.loads(json.dumps(described))


def refuse_other(folder: Path, described: dict[str, Any]) -> None:
    """Raise ConfigError naming the first thing in which a store differs from what a run would ask."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ConfigError("store.folder", str(folder), "holds no store", "make it: halfseen teach RECIPE, same options")
    stored = json.loads(path.read_text())
    names = stored.keys() | described.keys()
    for name in sorted(names if DIGEST in described else names - {DIGEST}):
        if stored.get(name) != described.get(name):
            raise ConfigError(
                name if "." in name else "store.folder",
                described.get(name),
                f"the answers in {folder} were made with {stored.get(name)!r}: of other images, or by another teacher",
                "use the same options, or another store.folder",
            )


def create(folder: Path, described: dict[str, Any]) -> None:
    """Make a store, or see that an existing one is of the same answers."""
    if (folder / DESCRIPTION).is_file():
        refuse_other(folder, described)
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{DESCRIPTION}.{os.getpid()}"
    temporary.write_text(json.dumps(described, indent=1) + "\n")
    os.replace(temporary, folder / DESCRIPTION)


# ------------------------------------------------------------------------------------------------- arrays


def packed(answer: dict[str, Any], cfg: StoreConfig) -> dict[str, np.ndarray]:
    """An answer as the arrays that are stored."""
    arrays: dict[str, Tensor] = {}
    if "teacher_logits" in answer:
        arrays |= packed_scores(answer["teacher_logits"], cfg.top)
    for kind in ("qkv", "hidden"):
        for number, tokens in enumerate(answer.get(f"teacher_{kind}", ())):
            arrays |= packed_tokens(f"{kind}{number}", tokens, cfg.tokens)
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def packed_scores(logits: Tensor, top: int) -> dict[str, Tensor]:
    """The highest scores [B, k] with their classes, and what each of the others would have if all were alike [B]."""
    classes = logits.shape[1]
    kept = min(top or classes, classes)
    value, chosen = logits.float().topk(kept, dim=1)
    others = logits.float().scatter(1, chosen, -torch.inf).logsumexp(1)
    rest = others - np.log(classes - kept) if kept < classes else torch.zeros_like(others)
    smallest = torch.int16 if classes <= 2**15 else torch.int32
    return {"scores.value": value.half(), "scores.class": chosen.to(smallest), "scores.rest": rest.half()}


def unpacked_scores(arrays: dict[str, Tensor], classes: int) -> Tensor:
    """float32 [B, K]: the kept scores in their places, the rest's everywhere else."""
    filled = arrays["scores.rest"].float()[:, None].expand(-1, classes)
    return filled.scatter(1, arrays["scores.class"].long(), arrays["scores.value"].float())


def packed_tokens(name: str, tokens: Tensor, kind: str) -> dict[str, Tensor]:
    """Tokens [B', N, C] in half precision, or as int8 with a scale for each token."""
    if kind == "fp16":
        return {name: tokens.half()}
    scale = tokens.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (tokens.float() / scale).round().to(torch.int8), f"{name}.scale": scale}


def unpacked_tokens(name: str, arrays: dict[str, Tensor]) -> Tensor:
    """float32 [B', N, C]."""
    scale = arrays.get(f"{name}.scale")
    return arrays[name].float() if scale is None else arrays[name].float() * scale


def unpacked(arrays: dict[str, Tensor], classes: int) -> dict[str, Any]:
    """The answer that arrays stand for."""
    answer: dict[str, Any] = {}
    if "scores.value" in arrays:
        answer["teacher_logits"] = unpacked_scores(arrays, classes)
    for kind in ("qkv", "hidden"):
        count = sum(name.startswith(kind) and "." not in name for name in arrays)
        if count:
            tokens = [unpacked_tokens(f"{kind}{number}", arrays) for number in range(count)]
            answer[f"teacher_{kind}"] = [part.flatten(0, 1) if part.ndim == 4 else part for part in tokens]
    return answer


def losses_of(answer: dict[str, Any], restored: dict[str, Any]) -> dict[str, float]:
    """What storing lost: the largest error of a probability, and of a token's channel over the token's largest one."""
    lost: dict[str, float] = {}
    if "teacher_logits" in answer:
        before, after = (side["teacher_logits"].float().cpu().softmax(1) for side in (answer, restored))
        lost["scores"] = (before - after).abs().max().item()
    for kind in ("qkv", "hidden"):
        sides = (side.get(f"teacher_{kind}", ()) for side in (answer, restored))
        for number, (before, after) in enumerate(zip(*sides, strict=True)):
            before = before.float().cpu()
            peak = before.abs().amax(-1, keepdim=True).clamp(min=1e-12)
            lost[f"{kind}{number}"] = ((before - after.cpu()).abs() / peak).max().item()
    return lost


# ------------------------------------------------------------------------------------------------- writing


def checksums(keys: Sequence[str]) -> np.ndarray:
    """CRC-32 of samples' keys, uint32."""
    return np.array([zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in keys], np.uint32)


def write_block(
    writer: ShardWriter, first: int, keys: Sequence[str], answer: dict[str, Any], cfg: StoreConfig
) -> dict[str, float]:
    """Append the answers to len(keys) positions from ``first`` on; returns what storing them lost."""
    count = len(keys)
    arrays = {name: per_image(array, count) for name, array in packed(answer, cfg).items()}
    classes = answer["teacher_logits"].shape[1] if "teacher_logits" in answer else 0
    restored = unpacked({name: torch.from_numpy(array) for name, array in arrays.items()}, classes)
    lost = losses_of(answer, restored)
    members = {f"{name}.npy": as_bytes(array) for name, array in (arrays | {"key": checksums(keys)}).items()}
    writer.write(f"{first:012d}", members | {"errors.json": json.dumps(lost).encode()})
    return lost


def per_image(array: np.ndarray, count: int) -> np.ndarray:
    """Rows [count * W, ...] of windows as [count, W, ...]; one row per image as it is."""
    return array if len(array) == count else array.reshape(count, -1, *array.shape[1:])


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
    """Reads answers of a store by position."""

    def __init__(self, folder: Path, block: int, span: int, classes: int, device: torch.device) -> None:
        self.folder, self.block, self.span, self.classes, self.device = folder, block, span, classes, device
        self.shards, self.blocks = Recent(4), Recent(16)

    def __call__(self, position: Tensor, keys: Sequence[str]) -> dict[str, Any]:
        """The answers to positions int64 [B], on the CPU, whose samples have these keys. Raises Missing."""
        arrays = [self._row(place, check) for place, check in zip(position.tolist(), checksums(keys).tolist())]
        together = {name: np.stack([row[name] for row in arrays]) for name in arrays[0] if name != "key"}
        moved = {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in together.items()}
        return unpacked(moved, self.classes)

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

    def example(self) -> dict[str, Any]:
        """Any stored answer to one image, to see what is there. Raises Missing."""
        path = min(self.folder.glob("positions-*.tar"), default=None)
        if path is None:
            raise Missing(f"{self.folder} holds no shard")
        rows = {name: array[:1] for name, array in Shard(path).block(0).items() if name != "key"}
        return unpacked({name: torch.from_numpy(array.copy()) for name, array in rows.items()}, self.classes)

    def gaps(self, total: int) -> list[str]:
        """Shards that are missing of the first ``total`` positions."""
        names = (shard_name(first) for first in range(0, total, self.span))
        return [name for name in names if not (self.folder / name).is_file()]
