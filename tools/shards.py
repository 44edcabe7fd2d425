"""``halfseen shards build|index|check|stats``: make WebDataset shards and look into them."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from halfseen.config import ConfigError, Data, Source
from halfseen.data import index as indexes
from halfseen.data import open_set
from halfseen.data.cache import is_remote
from halfseen.data.decode import decode
from halfseen.data.hashing import mix_array, purpose
from halfseen.data.reader import BadSample, Reader
from halfseen.data.sources import ImageSet, shards_of

from . import shards_build, shards_check
from .terminal import console, progress, spread

ANY_LABEL = 1 << 31  # more classes than anyone has: only the kind of a label is checked


# ---------------------------------------------------------------------------------------------------- index


def index_one(job: tuple[str, bool]) -> indexes.Summary:
    """Build one shard's sidecar (job: path, force)."""
    path, force = Path(job[0]), job[1]
    if force:
        index = indexes.build(path)
        indexes.write(index, path.with_name(path.name + indexes.SUFFIX))
        return index.summary
    return indexes.ensure(path)[1]


def run_index(arguments: argparse.Namespace) -> int:
    """Write the sidecars of a set; exit code 1 when a shard is incomplete."""
    paths = shards_of(arguments.shards, "shards")
    remote = next((path for path in paths if is_remote(path)), None)
    if remote is not None:
        raise ConfigError("shards", remote, "is remote", "index shards where they lie and upload the .idx.json too")
    jobs = [(path, arguments.force) for path in paths]
    summaries = list(spread(index_one, jobs, arguments.workers, "indexing"))
    table = Table("shard", "samples", "bytes", "state")
    faulty = [(path, summary) for path, summary in zip(paths, summaries) if not summary.complete]
    for path, summary in faulty:
        state = f"INCOMPLETE: {summary.fault}; {summary.lost:,} bytes lost"
        table.add_row(Path(path).name, f"{summary.nsamples:,}", f"{summary.filesize:,}", state)
    total = sum(summary.nsamples for summary in summaries)
    table.add_row(
        f"{len(paths)} shards",
        f"{total:,}",
        f"{sum(s.filesize for s in summaries):,}",
        f"{len(faulty)} incomplete",
    )
    console().print(table)
    if arguments.list:
        entries = [
            {
                "url": os.path.relpath(path, arguments.list.parent),
                "nsamples": s.nsamples,
                "filesize": s.filesize,
            }
            for path, s in zip(paths, summaries)
        ]
        arguments.list.write_text(
            json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries}, indent=1)
        )
    return 1 if faulty else 0


# ---------------------------------------------------------------------------------------------------- stats


def chosen_samples(images: ImageSet, most: int, seed: int) -> list[tuple[int, int]]:
    """(shard, sample) of at most ``most`` samples, picked by hash and read in shard order."""
    counts = images.sources[0].counts
    shard = np.repeat(np.arange(len(counts)), counts)
    sample = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    picked = np.sort(np.argsort(mix_array(seed, purpose("stats"), np.arange(len(shard))), kind="stable")[:most])
    return list(zip(shard[picked].tolist(), sample[picked].tolist()))


def label_kind(label: str, images: ImageSet) -> str:
    """``auto`` resolved: cls if any sample has such a member."""
    if label != "auto":
        return label
    shards = images.sources[0].shards
    return "cls" if any("cls" in indexes.read(shard.sidecar).extensions for shard in shards) else "none"


def folder_names(images: ImageSet) -> tuple[str, ...]:
    """The folders of all samples' keys."""
    summaries = [indexes.read_summary(shard.sidecar) for shard in images.sources[0].shards]
    return tuple(sorted({name for summary in summaries if summary for name in summary.folders}))


def measure(images: ImageSet, samples: list[tuple[int, int]], max_pixels: int) -> dict[str, Any]:
    """Channel mean and spread (every image weighs the same), sizes, bytes and labels of samples."""
    reader = Reader(images)
    mean, square = np.zeros(3), np.zeros(3)
    sides: list[tuple[int, int]] = []
    sizes: list[int] = []
    labels: Counter[Any] = Counter()  # numbers, or names of folders
    bad = 0
    for shard, sample in progress(samples, "decoding", len(samples)):
        try:
            content = reader.read(0, shard, sample)
            image = decode(content.data, max_pixels).numpy()
        except BadSample:
            bad += 1
            continue
        scaled = image.astype(np.float32) / 255
        mean += scaled.mean((1, 2))
        square += (scaled**2).mean((1, 2))
        sides.append((image.shape[1], image.shape[2]))
        sizes.append(len(content.data))
        if images.labelled:
            labels[indexes.folder_of(content.key) if images.label == "folder" else content.label] += 1
    reader.close()
    good = max(len(sides), 1)
    mean, square = mean / good, square / good
    return {
        "samples": len(sides),
        "bad": bad,
        "mean": mean.round(4).tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).round(4).tolist(),
        "shorter_side": _spread_of([min(side) for side in sides]),
        "longer_side": _spread_of([max(side) for side in sides]),
        "bytes": _spread_of(sizes),
        "labels": {str(label): count for label, count in sorted(labels.items())},
    }


def _spread_of(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    points = np.percentile(values, [0, 5, 25, 50, 75, 95, 100]).astype(int).tolist()
    return dict(zip(("least", "5%", "25%", "median", "75%", "95%", "most"), points))


def run_stats(arguments: argparse.Namespace) -> int:
    """Print what a set holds."""
    shards_of(arguments.shards, "shards")
    images = open_set(Data([Source(arguments.shards)], label="none", cache=arguments.cache), "train")
    label = label_kind(arguments.label, images)
    if label != "none":
        images = replace(images, label=label, classes=ANY_LABEL, folders=folder_names(images))
    result = measure(images, chosen_samples(images, arguments.samples, arguments.seed), arguments.max_pixels)
    result = {
        "images": images.images,
        "shards": len(images.sources[0].shards),
        "fingerprint": images.fingerprint,
        **result,
    }
    table = Table("", "least", "5%", "25%", "median", "75%", "95%", "most")
    for name in ("shorter_side", "longer_side", "bytes"):
        table.add_row(name.replace("_", " "), *(f"{value:,}" for value in result[name].values()))
    out = console()
    out.print(f"{result['images']:,} images in {result['shards']} shards, fingerprint {result['fingerprint']}")
    out.print(f"measured on {result['samples']:,} ({result['bad']} bad): mean {result['mean']}, std {result['std']}")
    out.print(table)
    if result["labels"]:
        counts = result["labels"]
        most = sorted(counts, key=lambda name: -counts[name])
        shown = ", ".join(f"{name}: {counts[name]}" for name in most[:10])
        out.print(f"{len(counts)} labels among them, commonest {shown}; rarest {most[-1]}: {counts[most[-1]]}")
    elif label == "none" and arguments.label == "auto":
        out.print("no labels: no sample has a .cls member (if they are elsewhere: --label json:KEY or folder)")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["bad"] else 0


# ----------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="halfseen shards", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    shards = "folder of tars, glob, brace pattern, tar, URL or embedded:NAME/SPLIT"
    workers = min(8, os.cpu_count() or 1)

    build = commands.add_parser("build", help="image folder, list or tar set -> shards with indexes; resumable")
    build.add_argument(
        "source",
        help="folder of images (class subfolders give labels), .csv/.txt list of path[,label], or " + shards,
    )
    build.add_argument("out", type=Path, help="folder for the shards")
    build.add_argument("--name", default="images", help="start of the shards' names (default: %(default)s)")
    build.add_argument("--shard-size", type=int, default=1000, help="samples per shard (default: %(default)s)")
    build.add_argument(
        "--short-side", type=int, default=0, help="shrink to this shorter side in pixels; 0: keep (default)"
    )
    build.add_argument("--quality", type=int, default=92, help="JPEG quality of shrunk images (default: %(default)s)")
    build.add_argument("--label", default="auto", help="from a tar set: also write .cls from json:KEY or folder")
    build.add_argument(
        "--classes",
        type=Path,
        help="classes.txt of an earlier build, so that names get the same numbers; default: this source's, sorted",
    )
    build.add_argument("--keep-order", action="store_true", help="do not shuffle the samples")
    build.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")

    index = commands.add_parser("index", help="write the index beside each tar")
    index.add_argument("shards", help=shards)
    index.add_argument("--force", action="store_true", help="rebuild what is there")
    index.add_argument("--list", type=Path, help="also write this list of the set (index.json, the wids shape)")

    check = commands.add_parser(
        "check", help="find damaged, duplicate and mislabelled samples; --repair rescues the rest"
    )
    check.add_argument("shards", help=shards)
    check.add_argument(
        "--label", default="auto", help="cls, json:KEY, folder or none; auto: cls where any sample has it"
    )
    check.add_argument("--classes", type=int, default=0, help="labels must be below this; 0: any (default)")
    check.add_argument("--repair", type=Path, metavar="OUT", help="write the good samples to new shards here")
    check.add_argument("--rows", type=int, default=40, help="problems to print (default: %(default)s)")

    stats = commands.add_parser("stats", help="mean and std per channel, sizes, label counts")
    stats.add_argument("shards", help=shards)
    stats.add_argument(
        "--label", default="auto", help="cls, json:KEY, folder or none; auto (default): cls where any sample has it"
    )
    stats.add_argument("--samples", type=int, default=5000, help="images to decode (default: %(default)s)")
    stats.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")

    for command in (build, index, check):
        command.add_argument("--workers", type=int, default=workers, help="processes (default: %(default)s)")
    for command in (build, check, stats):
        command.add_argument("--cache", help="folder for remote shards")
        command.add_argument("--max-pixels", type=int, default=100_000_000, help="larger images count as bad")
    for command in (check, stats):
        command.add_argument("--json", type=Path, help="also write the result here")
    return root


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    arguments = parser().parse_args(list(argv))
    commands = {"build": shards_build.run, "index": run_index, "check": shards_check.run, "stats": run_stats}
    return commands[arguments.command](arguments)
