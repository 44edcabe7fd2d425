"""From what the user names (folder, glob, braces, URL, pipe:, embedded:) to an image set with counts."""

import glob
import json
import logging
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
from webdataset.shardlists import expand_urls

from halfseen.config import ConfigError, Data, Source
from halfseen.data import index as indexes
from halfseen.data.cache import Cache, is_remote
from halfseen.data.plan import shares

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One tar and its index."""

    name: str  # basename, for reports
    url: str  # path or URL
    sidecar: Path
    filesize: int  # bytes
    nsamples: int


@dataclass(frozen=True)
class ImageSource:
    """The shards of one source of a mixture; counts leaves out what ``limit`` cuts."""

    shards: tuple[Shard, ...]
    counts: np.ndarray  # int64, samples used of each shard
    weight: float = 1.0


@dataclass(frozen=True)
class ImageSet:
    """Opened shards: counts and identity, no descriptors; cheap to hand to worker processes."""

    sources: tuple[ImageSource, ...]
    label: str  # as in config.Data
    classes: int
    folders: tuple[str, ...] = ()  # label: folder -- the class names in order, when they are no numbers
    cache: Cache | None = None

    @property
    def images(self) -> int:
        """Samples per epoch, over all sources."""
        return int(sum(source.counts.sum() for source in self.sources))

    @property
    def labelled(self) -> bool:
        """Whether batches carry labels."""
        return self.label != "none" and self.classes > 0

    @property
    def fingerprint(self) -> str:
        """Identity of the data: hash of every shard's (basename, filesize, samples used).

        Of a mixture, also where each source begins and which share of the positions it fills.
        """
        rows = list[tuple[str, int, int]]()
        mixed = shares([source.weight for source in self.sources]) if len(self.sources) > 1 else []
        for number, source in enumerate(self.sources):
            if mixed:
                rows.append(("/source", number, mixed[number]))  # no shard's basename has a slash
            used = zip(source.shards, source.counts)
            rows += [(shard.name, shard.filesize, int(count)) for shard, count in used if count]
        return indexes.fingerprint(rows)


# --------------------------------------------------------------------------------------------- specifications


def shards_of(spec: str, key: str = "data.train") -> list[str]:
    """Paths and URLs a specification names, in a fixed order. Raises ConfigError when it names none.

    spec: a folder (its *.tar), a glob, a brace pattern, one tar, a URL, ``pipe:COMMAND``,
    ``embedded:NAME/SPLIT``, or a list file (.txt: one per line; .json: wids shape) without ``pipe:`` entries.
    """
    if spec.startswith("embedded:"):
        found = _embedded(spec.removeprefix("embedded:"), key)
    elif spec.startswith("file://"):
        found = shards_of(unquote(urlparse(spec).path), key)
    elif is_remote(spec):
        found = list(expand_urls(spec))
    elif Path(spec).is_dir():
        found = sorted(str(path) for path in Path(spec).glob("*.tar"))
    elif spec.endswith((".txt", ".json")):
        found = _listed(Path(spec), key)
    elif any(letter in spec for letter in "*?["):
        found = sorted(glob.glob(os.path.expanduser(spec), recursive=True))
    else:
        found = list(expand_urls(os.path.expanduser(spec)))
    if not found:
        raise ConfigError(key, spec, "names no tar file", "check the path; `halfseen shards build` makes shards")
    missing = next((path for path in found if not is_remote(path) and not Path(path).is_file()), None)
    if missing is not None:
        raise ConfigError(
            key, spec, f"there is no file {missing}", "check the path (braces {000..015} count inclusively)"
        )
    return found


def _embedded(name: str, key: str) -> list[str]:
    root = Path(str(resources.files("halfseen.data"))) / "embedded"
    set_name, _, split = name.partition("/")
    folder = root / set_name
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if set_name not in known:
        raise ConfigError(
            key, f"embedded:{name}", "is not shipped with halfseen", f"one of {known}, or your own shards"
        )
    found = sorted(str(path) for path in folder.glob(f"{split}-*.tar" if split else "*.tar"))
    if not found:
        splits = sorted({path.name.rpartition("-")[0] for path in folder.glob("*.tar")})
        raise ConfigError(key, f"embedded:{name}", "has no such split", f"use one of {splits}")
    return found


def _listed(path: Path, key: str) -> list[str]:
    """Entries of a list file, relative to its folder; it is data, not the user's own words: no commands."""
    if not path.is_file():
        raise ConfigError(key, str(path), "there is no such file", "check the path")
    if path.suffix == ".json":
        try:
            entries = [str(entry["url"]) for entry in json.loads(path.read_text())["shardlist"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                key, str(path), f"is no list of shards ({error!r})", 'use {"shardlist": [{"url": ...}]}'
            ) from error
    else:
        entries = [line.strip() for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    for entry in entries:
        if entry.startswith("pipe:"):
            raise ConfigError(
                key,
                entry,
                f"{path} holds a shell command",
                "name pipe: sources in the config or on the command line only",
            )
    return [entry if is_remote(entry) else str(path.parent / entry) for entry in entries]


# ---------------------------------------------------------------------------------------------------- opening


def open_set(data: Data, which: str) -> ImageSet:
    """Open the training or evaluation shards, building missing indexes.

    which: "train" or "val". Raises ConfigError when nothing is named, found or labelled as asked, and when the
    classes of "val" are named otherwise than those of the training shards (where these are at hand).
    """
    if which == "val":
        chosen, limit = [Source(data.val)] if data.val else [], 0
    else:
        chosen, limit = data.train, data.limit
    key = f"data.{which}"
    if not chosen:
        raise ConfigError(key, chosen, "names no shards", f"set {key} to a folder of tars, or embedded:emoji/{which}")
    cache = Cache(Path(data.cache).expanduser(), round(data.cache_gib * 2**30)) if data.cache else None
    sources, folders = [], set[str]()
    for source in chosen:
        opened, names = _open_source(source, limit, cache, key)
        sources.append(opened)
        folders |= names
    classes = _folder_classes(folders, data, key) if data.label == "folder" and data.classes else ()
    if which == "val" and data.classes:
        refuse_other_classes(data)
    return ImageSet(tuple(sources), data.label, data.classes, classes, cache)


def _open_source(source: Source, limit: int, cache: Cache | None, key: str) -> tuple[ImageSource, set[str]]:
    shards, folders = [], set[str]()
    for url in shards_of(source.shards, key):
        if not is_remote(url):
            sidecar, summary = indexes.ensure(Path(url))
        elif cache is None:
            raise ConfigError("data.cache", None, f"{url} is remote", "set data.cache to a folder on local disk")
        else:
            sidecar, summary = cache.sidecar(url)
        name = url if url.startswith("pipe:") else url.rpartition("/")[2]
        shards.append(Shard(name, url, sidecar, summary.filesize, summary.nsamples))
        folders.update(summary.folders)
    counts = np.array([shard.nsamples for shard in shards], np.int64)
    if limit:
        counts = np.clip(limit - (np.cumsum(counts) - counts), 0, counts)
    if counts.sum() == 0:
        raise ConfigError(key, source.shards, "holds no sample", "see `halfseen shards check`")
    return ImageSource(tuple(shards), counts, source.weight), folders


def _folder_classes(folders: set[str], data: Data, key: str) -> tuple[str, ...]:
    """Class names in order for ``label: folder``; empty when the names are the class numbers themselves."""
    if not folders - {""}:
        reason = f"no key in {key} has a folder part"
        raise ConfigError("data.label", "folder", reason, "use data.label=cls for what `halfseen shards build` wrote")
    if all(name.isdecimal() for name in folders):
        return ()
    if len(folders) != data.classes:
        # A set that lacks one class would silently shift every later label.
        raise ConfigError(
            "data.label",
            "folder",
            f"{key} has {len(folders)} folders for data.classes={data.classes}: their order is no label",
            "name the folders by class number, or rebuild with `halfseen shards build`, which writes labels",
        )
    return tuple(sorted(folders))


# ------------------------------------------------------------------------------------------- names of classes


def refuse_other_classes(data: Data) -> None:
    """Raise ConfigError if a number means one class in the training shards and another in the evaluation shards.

    Compared are the folders' names for ``label: folder``, and else the classes.txt that `halfseen shards build`
    writes beside the shards, where both sides have one.
    """
    if data.label not in ("cls", "folder") or not data.val:
        return
    own = class_names(data.val, data.label)
    for source in data.train if own else []:
        others = class_names(source.shards, data.label)
        if not others or own == others:
            continue
        place = next((n for n, (a, b) in enumerate(zip(own, others)) if a != b), min(len(own), len(others)))
        here, there = (repr(names[place]) if place < len(names) else "nothing" for names in (own, others))
        raise ConfigError(
            "data.val",
            data.val,
            f"class {place} is {here} there and {there} in {source.shards} ({len(own)} and {len(others)} names)",
            "build it anew with the training shards' list: `halfseen shards build ... --classes TRAIN/classes.txt`",
        )


def class_names(spec: str, label: str) -> tuple[str, ...]:
    """Names of the classes 0, 1, ... of local shards; empty where they are not named, or not on this machine."""
    try:
        paths = [Path(url) for url in shards_of(spec) if not is_remote(url)]
    except ConfigError:  # a set can be evaluated where the training shards are not
        return ()
    if label == "folder":
        found = {name for path in paths for name in indexes.ensure(path)[1].folders}
        return () if all(name.isdecimal() for name in found) else tuple(sorted(found))
    lists = {path.parent / "classes.txt" for path in paths}
    named = {read_classes(path) for path in lists if path.is_file()}
    return named.pop() if len(named) == 1 else ()


def read_classes(path: Path) -> tuple[str, ...]:
    """The names in a classes.txt: one a line, the first is class 0."""
    return tuple(path.read_text().splitlines())
