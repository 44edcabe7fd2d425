"""``halfseen shards check``: what is wrong in a set of shards, and new shards of what is right."""

import argparse
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from halfseen.config import ConfigError
from halfseen.data import index as indexes
from halfseen.data.cache import Cache, is_remote
from halfseen.data.decode import decode
from halfseen.data.reader import BadLabel, BadSample, Reader
from halfseen.data.sources import ImageSet, ImageSource, Shard, shards_of
from halfseen.data.writer import ShardWriter

from .terminal import console, spread

ANY_LABEL = 1 << 31


@dataclass(frozen=True)
class Problem:
    """One finding."""

    shard: str
    key: str  # empty for the shard as a whole
    offset: int  # of the image in bytes; -1 for none
    kind: str  # damaged shard, stale index, unreadable, label, duplicate image, duplicate key
    detail: str


@dataclass(frozen=True)
class Good:
    """A sample without a finding of its own."""

    sample: int
    key: str
    offset: int
    digest: bytes  # of the image's bytes


@dataclass(frozen=True)
class Checked:
    """One shard's findings and the content of its good samples."""

    path: str
    samples: int
    problems: list[Problem]
    good: list[Good]


def check_shard(path: str, label: str, classes: int, folders: tuple[str, ...], max_pixels: int) -> Checked:
    """Parse, read and decode everything in one shard, trusting no index; goes on behind damage."""
    place = Path(path)
    index = indexes.build(place, rescue=True)
    name, problems = place.name, list[Problem]()
    if not index.summary.complete:
        detail = f"{index.summary.fault}; training would miss the {index.summary.lost:,} bytes from there on"
        problems.append(Problem(name, "", -1, "damaged shard", detail))
    problems += stale_index(place)
    shard = Shard(name, path, place, index.summary.filesize, len(index))
    source = ImageSource((shard,), np.array([len(index)], np.int64))
    reader = Reader(ImageSet((source,), label, classes or ANY_LABEL, folders))
    reader.indexes.get(path, lambda: index)  # the fresh index, not the one beside the tar
    good = []
    for sample in range(len(index)):
        try:
            content = reader.read(0, 0, sample)
            decode(content.data, max_pixels)
        except BadSample as bad:
            kind = "label" if isinstance(bad, BadLabel) else "unreadable"
            offset = bad.offset if bad.offset >= 0 else next(index.members(sample))[1]
            problems.append(Problem(name, index.key(sample), offset, kind, bad.reason))
            continue
        digest = hashlib.blake2b(content.data, digest_size=16).digest()
        good.append(Good(sample, content.key, content.offset, digest))
    reader.close()
    return Checked(path, len(index), problems, good)


def stale_index(shard: Path) -> list[Problem]:
    """A sidecar that differs from what the tar holds now."""
    sidecar = shard.with_name(shard.name + indexes.SUFFIX)
    if not sidecar.exists():
        return []
    fresh = indexes.build(shard)
    try:
        same = indexes.dumps(indexes.read(sidecar)) == indexes.dumps(fresh)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    return [] if same else [Problem(shard.name, "", -1, "stale index", f"{sidecar.name} does not fit the tar")]


def repeated(results: list[Checked]) -> list[tuple[Problem, int]]:
    """Samples whose image bytes or key occurred before, in shard order, each with its number in its shard."""
    found = []
    first_image: dict[bytes, str] = {}
    first_key: dict[str, str] = {}
    for result in results:
        name = Path(result.path).name
        for good in result.good:
            here = f"{name}: {good.key}"
            if good.digest in first_image:
                what = "duplicate image", f"same bytes as {first_image[good.digest]}"
            elif good.key in first_key:
                what = "duplicate key", f"another image is at {first_key[good.key]}"
            else:
                first_image[good.digest] = first_key[good.key] = here
                continue
            found.append((Problem(name, good.key, good.offset, *what), good.sample))
    return found


def repair_shard(job: tuple[str, Path, list[int]]) -> int:
    """Write chosen samples of one shard, all their members, to a new one; returns how many."""
    path, out, samples = Path(job[0]), job[1], job[2]
    index = indexes.build(path, rescue=True)
    with path.open("rb") as file, ShardWriter(out) as shard:
        for sample in samples:
            members = {}
            for extension, offset, size in index.members(sample):
                file.seek(offset)
                members[extension] = file.read(size)
            shard.write(index.key(sample), members)
    return len(samples)


def label_kind(label: str, paths: list[str]) -> str:
    """``auto`` resolved: cls if any shard has such a member."""
    if label != "auto":
        return label
    return "cls" if any("cls" in indexes.build(Path(path), rescue=True).extensions for path in paths) else "none"


def local_paths(spec: str, cache: str | None) -> list[str]:
    """Paths of a set's shards, remote ones fetched."""
    paths = []
    for url in shards_of(spec, "shards"):
        if is_remote(url):
            if cache is None:
                raise ConfigError("cache", None, f"{url} is remote", "name a folder: --cache DIR")
            store = Cache(Path(cache))
            store.open(url, None).close()
            url = str(store.place(url))
        paths.append(url)
    return paths


def run(arguments: argparse.Namespace) -> int:
    """Check a set, print a table, repair where asked; exit code 1 when anything was found."""
    paths = local_paths(arguments.shards, arguments.cache)
    label = label_kind(arguments.label, paths)
    folders: set[str] = set()
    if label == "folder":
        folders = {name for path in paths for name in indexes.build(Path(path), rescue=True).summary.folders}
    names = () if all(name.isdecimal() for name in folders) else tuple(sorted(folders))
    work = partial(
        check_shard,
        label=label,
        classes=arguments.classes,
        folders=names,
        max_pixels=arguments.max_pixels,
    )
    results = list(spread(work, paths, arguments.workers, "checking"))
    again = repeated(results)
    problems = [problem for result in results for problem in result.problems] + [problem for problem, _ in again]
    report(results, problems, arguments.rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(problem) for problem in problems], indent=1) + "\n")
    if arguments.repair:
        drop = {(problem.shard, sample) for problem, sample in again}
        repair(results, drop, arguments)
    return 1 if problems else 0


def repair(results: list[Checked], drop: set[tuple[str, int]], arguments: argparse.Namespace) -> None:
    """Write the good samples of every shard into a new folder."""
    out = arguments.repair
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ConfigError("repair", str(out), "already holds tars", "name an empty folder")
    jobs = []
    for result in results:
        name = Path(result.path).name
        samples = [good.sample for good in result.good if (name, good.sample) not in drop]
        if samples:
            jobs.append((result.path, out / name, samples))
    written = sum(spread(repair_shard, jobs, arguments.workers, "repairing"))
    total = sum(result.samples for result in results)
    console().print(f"{written:,} good samples of {total:,} found are in {len(jobs)} new shards: {out}")


def report(results: list[Checked], problems: list[Problem], rows: int) -> None:
    """Print the findings."""
    screen = console()
    samples = sum(result.samples for result in results)
    if not problems:
        screen.print(f"{len(results)} shards, {samples:,} samples: nothing wrong")
        return
    table = Table("shard", "sample", "byte", "kind", "what")
    for problem in problems[:rows]:
        where = "" if problem.offset < 0 else f"{problem.offset:,}"
        table.add_row(*(escape(text) for text in (problem.shard, problem.key, where, problem.kind, problem.detail)))
    screen.print(table)
    if len(problems) > rows:
        screen.print(f"... and {len(problems) - rows} more (--rows, --json)")
    counts = Counter(problem.kind for problem in problems)
    text = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    screen.print(f"{len(results)} shards, {samples:,} samples, {len(problems)} problems: {text}")
