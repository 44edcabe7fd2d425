"""``halfseen shards build``: an image folder, a list, or another tar set into shards with indexes."""

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from torch import Tensor

from halfseen.config import ConfigError, Data, Source
from halfseen.data import index as indexes
from halfseen.data import open_set
from halfseen.data.decode import decode
from halfseen.data.hashing import mix_array, purpose
from halfseen.data.reader import BadSample, Reader
from halfseen.data.sources import ImageSet, read_classes
from halfseen.data.transforms import resize
from halfseen.data.writer import ShardWriter

from .terminal import console, spread

ANY_LABEL = 1 << 31  # more classes than anyone has: every label that is a number passes
SIGNATURES = (  # first bytes -> the extension a member gets, whatever the file was called
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


@dataclass(frozen=True)
class Item:
    """One image to be written."""

    origin: str  # path, or shard and sample of a tar set
    name: str  # readable part of the key
    label: int = -1  # -1: none
    shard: int = -1  # of a tar set
    sample: int = -1


@dataclass(frozen=True)
class Settings:
    """What decides the shards' content; kept in build.json so that only the same build is continued."""

    source: str
    name: str
    shard_size: int
    short_side: int
    quality: int
    label: str
    keep_order: bool
    seed: int
    max_pixels: int


# ---------------------------------------------------------------------------------------------------- sources


def numbering(found: set[str], given: Sequence[str], source: str) -> list[str]:
    """Class names in order: those given (--classes), else those found, sorted. Refuses a found one not given."""
    unknown = sorted(found - set(given)) if given else []
    if unknown:
        reason = f"has {len(unknown)} classes that --classes does not name, e.g. {unknown[0]!r}"
        raise ConfigError("source", source, reason, "correct their names, or leave them out of the source")
    return list(given) or sorted(found)


def from_folder(root: Path, given: Sequence[str] = ()) -> tuple[list[Item], list[str]]:
    """Images below a folder; its direct subfolders are the classes. Returns (items, class names)."""
    paths = sorted(
        path for path in root.rglob("*") if path.suffix[1:].lower() in indexes.IMAGE_EXTENSIONS and path.is_file()
    )
    tops = {path.relative_to(root).parts[0] for path in paths if path.parent != root}
    loose = [path for path in paths if path.parent == root]
    if tops and loose:
        reason = f"has images beside its class folders, e.g. {loose[0].name}"
        raise ConfigError("source", str(root), reason, "move them into a class folder, or name a list of paths")
    classes = numbering(tops, given, str(root)) if tops else []
    number = {name: label for label, name in enumerate(classes)}
    items = [Item(str(path), path.stem, number.get(path.relative_to(root).parts[0], -1)) for path in paths]
    return items, classes


def from_list(path: Path, given: Sequence[str] = ()) -> tuple[list[Item], list[str]]:
    """``path[,label]`` lines (tabs in a .tsv), relative to the list; labels are numbers, or names of classes."""
    with path.open(newline="") as file:
        separator = "\t" if path.suffix == ".tsv" else ","
        rows = [row for row in csv.reader(file, delimiter=separator) if row and not row[0].startswith("#")]
    refuse_other_separator(path, rows, separator)
    if rows and rows[0][0].strip().lower() in ("path", "file", "image", "filename"):
        rows = rows[1:]
    labels = [row[1].strip() if len(row) > 1 else "" for row in rows]
    numbers = all(re.fullmatch(r"\d*", label) for label in labels)
    classes = list(given) if numbers else numbering(set(labels), given, str(path))
    if "" in labels and any(labels):
        raise ConfigError(
            "source", str(path), f"line {labels.index('') + 1} has no label, others do", "label all or none"
        )
    number = {name: label for label, name in enumerate(classes)}
    items = []
    for row, label in zip(rows, labels):
        place = path.parent / row[0].strip()
        items.append(Item(str(place), place.stem, int(label or -1) if numbers else number[label]))
    beyond = max((item.label for item in items), default=-1)
    if numbers and given and beyond >= len(given):
        reason = f"has label {beyond}, but --classes names {len(given)} classes"
        raise ConfigError("source", str(path), reason, "correct the label or the list of classes")
    return items, classes


def refuse_other_separator(path: Path, rows: list[list[str]], separator: str) -> None:
    """Raise ConfigError when a list's lines are whole because another character separates their parts."""
    for row in rows:
        other = next((sign for sign in ";\t,|" if len(row) == 1 and sign in row[0]), None)
        if other and not (path.parent / row[0].strip()).is_file():
            reason = f"there is no file {row[0]!r}; is {other!r} meant to separate path and label?"
            raise ConfigError("source", str(path), reason, f"separate them by {separator!r}")


def from_shards(images: ImageSet) -> list[Item]:
    """Every sample of a tar set."""
    return [
        Item(f"{shard.name} sample {sample}", "", -1, number, sample)
        for number, shard in enumerate(images.sources[0].shards)
        for sample in range(shard.nsamples)
    ]


def open_source(source: str, label: str, cache: str | None) -> ImageSet | None:
    """The tar set a source names; None when it is an image folder or a list of images."""
    path = Path(source)
    tars = path.is_dir() and any(path.glob("*.tar"))
    if (path.is_dir() and not tars) or (path.suffix in (".csv", ".txt", ".tsv", ".lst") and path.is_file()):
        return None
    if not path.exists() and not set(source) & set("*?[{:"):
        raise ConfigError("source", source, "there is no such file or folder", "check the path")
    plain = label == "auto"
    data = Data([Source(source)], label="none" if plain else label, classes=0 if plain else ANY_LABEL, cache=cache)
    return open_set(data, "train")


def order(count: int, seed: int) -> list[int]:
    """A shuffle by hash: the same for the same seed on any machine."""
    return np.argsort(mix_array(seed, purpose("build"), np.arange(count)), kind="stable").tolist()


# ---------------------------------------------------------------------------------------------------- writing


def extension_of(data: bytes | memoryview) -> str:
    """The member extension for an image's bytes."""
    head = bytes(data[:16])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((extension for signature, extension in SIGNATURES if head.startswith(signature)), "img")


def shrink(image: Tensor, short_side: int, quality: int) -> bytes:
    """A uint8 [3, H, W] image with its shorter side reduced, as JPEG (4:2:0)."""
    _, height, width = image.shape
    factor = short_side / min(height, width)
    small = resize(image, (max(1, round(height * factor)), max(1, round(width * factor))))
    array = np.ascontiguousarray(small.permute(1, 2, 0).numpy())
    return simplejpeg.encode_jpeg(array, quality, "RGB", "420")


def members_of(item: Item, settings: Settings, reader: Reader | None) -> tuple[str, dict[str, bytes]]:
    """(name, extension -> content) of an item, its image checked and shrunk. Raises BadSample or OSError."""
    if reader is None:
        data: bytes | memoryview = Path(item.origin).read_bytes()
        name, members, label = item.name, {}, item.label
    else:
        content = reader.read(0, item.shard, item.sample)
        data, name, label = bytes(content.data), content.key.rpartition("/")[2], content.label
        members = reader.members(0, item.shard, item.sample)
        for extension in [name for name in members if name in indexes.IMAGE_EXTENSIONS]:
            del members[extension]
    image = decode(data, settings.max_pixels)
    if 0 < settings.short_side < min(image.shape[1:]):
        data = shrink(image, settings.short_side, settings.quality)
    if label >= 0:
        members["cls"] = str(label).encode()
    return name, {**members, extension_of(data): bytes(data)}


def write_shard(
    job: tuple[Path, list[tuple[int, Item]]], settings: Settings, images: ImageSet | None
) -> list[tuple[str, str]]:
    """Write one shard unless a finished one is there; returns the (origin, reason) of rejected images.

    One that had rejects is written again: they may be readable now. One without any good image leaves no tar.
    """
    path, items = job
    sidecar, record = (path.with_name(path.name + suffix) for suffix in (indexes.SUFFIX, ".rejected.jsonl"))
    summary = indexes.read_summary(sidecar)
    finished = summary is not None and path.is_file() and path.stat().st_size == summary.filesize
    if finished and not record.exists():
        return []
    reader = Reader(images) if images is not None else None
    rejected: list[tuple[str, str]] = []
    with ShardWriter(path) as shard:
        for number, item in items:
            try:
                name, members = members_of(item, settings, reader)
            except (BadSample, OSError) as error:
                rejected.append((item.origin, error.reason if isinstance(error, BadSample) else str(error)))
                continue
            readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
            shard.write(f"{number:08d}-{readable}", members)
        if rejected:
            text = "".join(json.dumps({"origin": origin, "reason": reason}) + "\n" for origin, reason in rejected)
            record.write_text(text)
    if not rejected:
        record.unlink(missing_ok=True)
    if len(rejected) == len(items):
        path.unlink()
        sidecar.unlink()
    if reader is not None:
        reader.close()
    return rejected


def claim(out: Path, settings: Settings, items: Sequence[Item]) -> None:
    """Refuse a folder that holds another build; note what this one is."""
    digest = hashlib.sha256(repr([(item.origin, item.label) for item in items]).encode("utf-8", "replace"))
    content = {"settings": asdict(settings), "images": len(items), "items": digest.hexdigest()[:16]}
    record = out / "build.json"
    if record.exists() and json.loads(record.read_text()) != content:
        raise ConfigError(
            "out", str(out), "holds a build of other images or settings", "name another folder, or delete it"
        )
    if not record.exists() and any(out.glob("*.tar")):
        raise ConfigError("out", str(out), "already holds tars", "name another folder")
    record.write_text(json.dumps(content, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> int:
    """Build, or go on with an interrupted build; exit code 1 when images were left out."""
    names = (
        "source",
        "name",
        "shard_size",
        "short_side",
        "quality",
        "label",
        "keep_order",
        "seed",
        "max_pixels",
    )
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    if settings.shard_size < 1:
        raise ConfigError("shard-size", settings.shard_size, "is not positive", "e.g. --shard-size 1000")
    images = open_source(settings.source, settings.label, arguments.cache)
    given = given_classes(arguments.classes)
    classes: list[str] = []
    if images is not None:
        if given:
            raise ConfigError("classes", str(arguments.classes), "tars bring their labels along", "drop --classes")
        items, classes = from_shards(images), list(images.folders)
    elif Path(settings.source).is_dir():
        items, classes = from_folder(Path(settings.source), given)
    else:
        items, classes = from_list(Path(settings.source), given)
    if not items:
        raise ConfigError(
            "source",
            settings.source,
            "holds no image",
            f"known extensions: {sorted(indexes.IMAGE_EXTENSIONS)}",
        )
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    claim(out, settings, items)
    numbers = list(range(len(items))) if settings.keep_order else order(len(items), settings.seed)
    numbered = [(place, items[number]) for place, number in enumerate(numbers)]
    size = settings.shard_size
    jobs = [
        (out / f"{settings.name}-{first // size:06d}.tar", numbered[first : first + size])
        for first in range(0, len(numbered), size)
    ]
    work = partial(write_shard, settings=settings, images=images)
    rejected = [entry for result in spread(work, jobs, arguments.workers, "building") for entry in result]
    if classes:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    report(out, len(items), sum(path.is_file() for path, _ in jobs), classes, rejected)
    if len(rejected) == len(items):
        origin, reason = rejected[0]
        raise ConfigError(
            "source", settings.source, f"none of its {len(items):,} images is usable", f"e.g. {origin}: {reason}"
        )
    return 1 if rejected else 0


def given_classes(path: Path | None) -> tuple[str, ...]:
    """The names in the file of --classes; none without it."""
    if path is None:
        return ()
    if not path.is_file():
        raise ConfigError("classes", str(path), "there is no such file", "name the classes.txt of an earlier build")
    names = read_classes(path)
    if not names or len(set(names)) != len(names):
        raise ConfigError("classes", str(path), "is empty or names a class twice", "one name a line; the first is 0")
    return names


def report(out: Path, images: int, shards: int, classes: list[str], rejected: list[tuple[str, str]]) -> None:
    """Say what was written and what was not."""
    screen = console()
    screen.print(f"{images - len(rejected):,} images in {shards} shards: {out}")
    if classes:
        screen.print(f"{len(classes)} classes, named in {out / 'classes.txt'}")
    for origin, reason in rejected[:10]:
        screen.print(f"  left out: {origin}: {reason}", markup=False)
    if rejected:
        screen.print(
            f"{len(rejected)} images were LEFT OUT; all are listed in {out}/*.rejected.jsonl. "
            "Mend them and run this again to add them"
        )
