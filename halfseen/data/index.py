"""Sidecar indexes: where every member of a tar shard lies, so that samples are read without streaming it.

``NAME.tar.idx.json`` stands beside ``NAME.tar``. Its first line alone tells the counts, so a set of thousands
of shards opens by reading one line each; the rest is read when a shard is. Built by ``halfseen shards``, or
here when missing.
"""

import fcntl
import hashlib
import itertools
import json
import logging
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes; a tar is a row of blocks
FORMAT = 1  # raised when the sidecar's meaning changes
SUFFIX = ".idx.json"
IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "img", "image"]
)
MOST_FOLDERS = 100_000  # distinct folder names kept per shard; more means the folders are no classes


@dataclass(frozen=True)
class Summary:
    """What a run must know of a shard before reading from it."""

    filesize: int  # bytes of the tar this index describes
    nsamples: int
    complete: bool  # False: the tar has bytes that no sample covers
    fault: str = ""  # why parsing stopped early
    lost: int = 0  # bytes after that place
    folders: tuple[str, ...] = ()  # distinct last directory parts of the keys, sorted


@dataclass
class ShardIndex:
    """All members of one shard, as arrays. Sample i owns the members first[i] .. first[i + 1]."""

    summary: Summary
    keys: list[str] | np.ndarray  # one per sample
    extensions: list[str]
    # array.array is as compact as numpy's and gives single numbers back ten times faster.
    first: "array[int]"  # [samples + 1]
    extension: "array[int]"  # [members], into extensions
    offset: "array[int]"  # [members], of the data, in bytes
    size: "array[int]"  # [members], in bytes

    def __len__(self) -> int:
        return self.summary.nsamples

    def key(self, sample: int) -> str:
        """The sample's key: its path in the tar up to the first dot of the last part."""
        value = self.keys[sample]
        return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)

    def members(self, sample: int) -> Iterator[tuple[str, int, int]]:
        """(extension, offset, size) of each member of a sample, in tar order."""
        rows = slice(self.first[sample], self.first[sample + 1])
        names = [self.extensions[code] for code in self.extension[rows]]
        return zip(names, self.offset[rows], self.size[rows])


@dataclass
class IndexBuilder:
    """Groups members into samples in tar order, the way webdataset does: by the path up to the first dot."""

    keys: list[str] = field(default_factory=list)
    members: list[list[tuple[int, int, int]]] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, offset: int, size: int) -> None:
        """Append one regular file; names without an extension and ``__meta__`` names belong to no sample."""
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem or name.startswith("__"):
            return
        key, code = folder + slash + stem, self.extensions.setdefault(extension.lower(), len(self.extensions))
        # A repeated extension under one key is a second sample of that name, not a member to drop.
        if not self.keys or self.keys[-1] != key or any(code == member[0] for member in self.members[-1]):
            self.keys.append(key)
            self.members.append([])
        self.members[-1].append((code, offset, size))

    def drop_cut_sample(self) -> str:
        """After a fault: drop the last sample if it lacks what all others have; returns its key, or ''."""
        if len(self.members) < 2:
            return ""
        common = set.intersection(*({member[0] for member in sample} for sample in self.members[:-1]))
        if common <= {member[0] for member in self.members[-1]}:
            return ""
        self.members.pop()
        return self.keys.pop()

    def finish(self, filesize: int, fault: str = "", lost: int = 0) -> ShardIndex:
        """The index of everything added."""
        folders = sorted({folder_of(key) for key in self.keys} - {""})
        summary = Summary(filesize, len(self.keys), not fault, fault, lost, tuple(folders[:MOST_FOLDERS]))
        return ShardIndex(summary, self.keys, list(self.extensions), *_columns(self.members))


Columns: TypeAlias = "tuple[array[int], array[int], array[int], array[int]]"


def _columns(members: Sequence[Sequence[Sequence[int]]], unit: int = 1) -> Columns:
    """first, extension, offset, size of each sample's members [extension, offset / unit, size]."""
    flat = [member for sample in members for member in sample]
    first = array("q", [0, *itertools.accumulate(len(sample) for sample in members)])
    offset = array("q", [place * unit for _, place, _ in flat])
    return first, array("i", [code for code, _, _ in flat]), offset, array("q", [size for _, _, size in flat])


def folder_of(key: str) -> str:
    """The last directory part of a key, empty when there is none."""
    return key.rpartition("/")[0].rpartition("/")[2]


# ------------------------------------------------------------------------------------------------ tar headers


def number(text: bytes) -> int:
    """A numeric tar field: octal text, or base-256 when the first bit is set; ValueError when neither."""
    if text and text[0] & 0x80:
        return int.from_bytes(text[1:], "big")
    return int(text.rstrip(b"\0 ").lstrip(b" ") or b"0", 8)


def header_fault(header: bytes) -> str:
    """Why 512 bytes are no tar header; empty when they are one."""
    if len(header) < BLOCK:
        return "the file ends inside a header"
    try:
        stored = number(header[148:156])
    except ValueError:
        return "bad header: its checksum field is not a number"
    # The checksum counts its own eight bytes as spaces.
    if sum(header) - sum(header[148:156]) + 256 != stored:
        return "bad header: checksum mismatch"
    return ""


def pax_values(payload: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: ``LENGTH KEY=VALUE\\n`` each."""
    values, position = {}, 0
    while position < len(payload):
        space = payload.find(b" ", position)
        if space < 0 or not payload[position:space].isdigit():
            break
        length = int(payload[position:space])
        if length < 5 or position + length > len(payload):
            break
        key, _, value = payload[space + 1 : position + length - 1].partition(b"=")
        values[key] = value
        position += length
    return values


def member_name(header: bytes) -> bytes:
    """The name in a ustar header, with its prefix field; old and GNU headers have no prefix."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def scan(data: mmap.mmap | bytes, builder: IndexBuilder, start: int = 0) -> tuple[int, str]:
    """Add every regular file from ``start`` on; returns (where it stopped, why; empty at a proper end)."""
    end, position = len(data), start
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while position < end:
        header = data[position : position + BLOCK]
        if not header.strip(b"\0"):
            return _end_of_archive(data, position)
        fault = header_fault(header)
        if fault:
            return position, fault
        try:
            size = int(pax[b"size"]) if b"size" in pax else number(header[124:136])
        except ValueError:
            return position, "bad header: its size field is not a number"
        body = position + BLOCK
        kind = header[156:157]
        if body + size > end:
            return position, "the file ends inside a member"
        following = body + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            long_name = data[body : body + size].rstrip(b"\0")
        elif kind == b"x":
            pax = pax_values(data[body : body + size])
        elif kind not in (b"g", b"K"):
            if kind in (b"0", b"\0", b"7"):
                name = pax.get(b"path") or long_name or member_name(header)
                builder.add(name.decode("utf-8", "surrogateescape"), body, size)
            long_name, pax = None, {}
        position = following
    return end, "no end-of-archive mark: the file was probably cut"


def _end_of_archive(data: mmap.mmap | bytes, position: int) -> tuple[int, str]:
    """A zero block ends a tar, unless something other than zeros follows it."""
    for place in range(position, len(data), 1 << 20):
        piece = data[place : place + (1 << 20)]
        rest = piece.lstrip(b"\0")
        if rest:
            return position, f"zeros in place of a header, but data at byte {place + len(piece) - len(rest)}"
    return len(data), ""


def next_header(data: mmap.mmap | bytes, start: int) -> int:
    """Where the next plausible header begins at or after ``start``, or -1: to rescue what follows damage."""
    place = -(-start // BLOCK) * BLOCK
    while True:
        magic = data.find(b"ustar", place)
        if magic < 0:
            return -1
        candidate = magic - 257
        if candidate >= place and candidate % BLOCK == 0 and not header_fault(data[candidate : candidate + BLOCK]):
            return candidate
        place = max(magic + 1, place)


def build(path: Path, rescue: bool = False) -> ShardIndex:
    """Parse a tar's headers. Stops at a bad header and says so in the summary; rescue: goes on behind it."""
    builder, filesize = IndexBuilder(), path.stat().st_size
    if filesize == 0:
        return builder.finish(0, "the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stopped, fault = scan(data, builder)
        first_fault, lost = (f"byte {stopped}: {fault}" if fault else ""), filesize - stopped
        if fault:
            cut = builder.drop_cut_sample()
            first_fault += f" (sample {cut!r} was cut and is left out)" if cut else ""
        while rescue and fault:
            place = next_header(data, stopped + BLOCK)
            if place < 0:
                break
            stopped, fault = scan(data, builder, place)
            if fault:
                builder.drop_cut_sample()
    return builder.finish(filesize, first_fault, lost)


# --------------------------------------------------------------------------------------------------- sidecars


def dumps(index: ShardIndex) -> str:
    """The sidecar's text: JSON whose first line holds the summary."""
    head = {"format": FORMAT, **asdict(index.summary)}
    members = [
        [[index.extension[row], index.offset[row] // BLOCK, index.size[row]] for row in range(a, b)]
        for a, b in itertools.pairwise(index.first)
    ]
    compact = (",", ":")
    return (
        json.dumps(head, separators=compact)[:-1]
        + ',\n"extensions":'
        + json.dumps(index.extensions)
        + ',\n"keys":'
        + json.dumps([index.key(sample) for sample in range(len(index))], separators=compact)
        + ',\n"members":'
        + json.dumps(members, separators=compact)
        + "}\n"
    )


def read_summary(path: Path) -> Summary | None:
    """The first line of a sidecar; None when it is of another format or damaged."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline().rstrip(b",\n") + b"}")
    except (OSError, ValueError):
        return None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        return None
    return summary_of(head)


def summary_of(content: dict[str, Any]) -> Summary:
    """The summary in a sidecar's first line, or in the whole of it."""
    plain = {part.name: content[part.name] for part in fields(Summary)}
    return Summary(**plain | {"folders": tuple(content["folders"])})


def read(path: Path) -> ShardIndex:
    """A whole sidecar as compact arrays; raises OSError or ValueError when it cannot be read."""
    content = json.loads(path.read_bytes())
    # One fixed-width array instead of a list of strings: a reader keeps hundreds of these.
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in content["keys"]] or [b""])
    return ShardIndex(summary_of(content), keys, content["extensions"], *_columns(content["members"], BLOCK))


def write(index: ShardIndex, path: Path) -> None:
    """Publish a sidecar in one step, so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        temporary.write_text(dumps(index))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The user's folder for indexes of shards whose own folder cannot be written; made if needed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "halfseen" / "indexes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # containers often have no home that can be written
        folder = Path(tempfile.gettempdir()) / f"halfseen-{os.getuid()}" / "indexes"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fallback(shard: Path) -> Path:
    digest = hashlib.sha256(str(shard.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_folder() / f"{digest}-{shard.name}{SUFFIX}"


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file against the node's other processes; it is released when a holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _current(shard: Path, filesize: int) -> tuple[Path, Summary] | None:
    for place in (shard.with_name(shard.name + SUFFIX), _fallback(shard)):
        summary = read_summary(place)
        if summary is not None and summary.filesize == filesize:
            return place, summary
    return None


def ensure(shard: Path) -> tuple[Path, Summary]:
    """A shard's sidecar and summary, building it when missing, damaged or of another file size."""
    filesize = shard.stat().st_size
    found = _current(shard, filesize)
    if found is None:
        # All ranks of a node ask at once; one of them builds.
        with exclusive(cache_folder() / "locks" / f"{_fallback(shard).name}.lock"):
            found = _current(shard, filesize) or _build_sidecar(shard)
    if not found[1].complete:
        logger.warning(
            "%s: %s. The %s bytes from there on are NOT in the data set (%d samples are). "
            "`halfseen shards check --repair` rescues what it can.",
            shard, found[1].fault, f"{found[1].lost:,}", found[1].nsamples,
        )  # fmt: skip
    return found


def _build_sidecar(shard: Path) -> tuple[Path, Summary]:
    index = build(shard)
    place = shard.with_name(shard.name + SUFFIX)
    if not os.access(shard.parent, os.W_OK):
        place = _fallback(shard)
        place.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s is not writable: the index of %s goes to %s", shard.parent, shard.name, place)
    write(index, place)
    return place, index.summary


def fingerprint(shards: Sequence[tuple[str, int, int]]) -> str:
    """Identity of a set: a hash over the (basename, filesize, nsamples) of its shards in order."""
    lines = "\n".join(f"{name} {filesize} {nsamples}" for name, filesize, nsamples in shards)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]
