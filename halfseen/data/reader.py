"""Reads one sample at its indexed offset: pread only, so no streaming and no shared file position."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from halfseen.data import index as indexes
from halfseen.data.cache import Opened, is_remote
from halfseen.data.sources import ImageSet, Shard

BLOCK = indexes.BLOCK
NEAR = 64 << 10  # bytes between a label and its image that are worth reading along
LARGEST_LABEL = 1 << 20  # bytes of a label member; more is no label, and reading it would cost memory
OPEN_FILES, OPEN_INDEXES = 64, 256  # shards and indexes that a process keeps open
LARGEST_OCTAL = 8 << 30  # bytes; above this a tar header's size field no longer says the size


class BadSample(Exception):
    """A sample that cannot be used. It is replaced, recorded and counted; see ledger.py."""

    def __init__(self, reason: str, shard: str = "", key: str = "", offset: int = -1) -> None:
        super().__init__(reason, shard, key, offset)
        self.reason, self.shard, self.key, self.offset = reason, shard, key, offset

    def __str__(self) -> str:
        return f"{self.shard}: {self.key} at byte {self.offset}: {self.reason}"


class BadLabel(BadSample):
    """A sample whose label is missing, unreadable or out of range."""


class StaleIndex(RuntimeError):
    """An index that belongs to another tar: every offset is suspect, so the run stops."""


class Sample(NamedTuple):
    """The undecoded content of one sample."""

    key: str
    data: memoryview  # the image file's bytes, in the reader's buffer: valid until the next read
    place: int  # where data begins in the reader's buffer
    label: int  # -1 where labels are not used
    shard: str
    offset: int  # of the image in the shard, in bytes


Value = TypeVar("Value")


class LeastRecent(Generic[Value]):
    """A bounded dictionary; what was not used for longest is dropped first."""

    def __init__(self, limit: int, drop: Callable[[Value], None] = lambda value: None) -> None:
        self.limit, self.drop, self.values = limit, drop, OrderedDict[str, Value]()

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        """The value for a key, made at first use."""
        value = self.values.get(key)
        if value is not None:
            self.values.move_to_end(key)
            return value
        value = self.values[key] = make()
        if len(self.values) > self.limit:
            self.drop(self.values.popitem(last=False)[1])
        return value

    def forget(self, key: str) -> None:
        """Drop one key now."""
        if key in self.values:
            self.drop(self.values.pop(key))


class Reader:
    """Samples of an image set by (source, shard, sample). Make one per process, after the fork.

    All reads go to one buffer, which stays in the processor's cache when every sample is decoded before the
    next is read. With ``keep`` they follow one another in it until ``take`` hands the buffer over.
    """

    def __init__(self, images: ImageSet, keep: bool = False) -> None:
        self.images, self.keep = images, keep
        self.folder_label = {name: number for number, name in enumerate(images.folders)}
        self.label_kind, _, self.label_path = images.label.partition(":") if images.labelled else ("", "", "")
        self.files = LeastRecent[Opened](OPEN_FILES, Opened.close)
        self.indexes = LeastRecent[indexes.ShardIndex](OPEN_INDEXES)
        self.buffer, self.used = np.empty(1 << 20, np.uint8), 0

    def close(self) -> None:
        """Close every shard."""
        for url in list(self.files.values):
            self.files.forget(url)

    def read(self, source: int, shard: int, sample: int) -> Sample:
        """One sample. Raises BadSample, or StaleIndex when the index is of another tar."""
        entry = self.images.sources[source].shards[shard]
        index = self.indexes.get(entry.url, lambda: self._index(entry))
        key = index.key(sample)
        label: tuple[int, int] | None = None
        image, offset, size = "", 0, 0
        for extension, place, length in index.members(sample):
            if extension == self.label_kind:
                label = place, length
            elif not image and extension in indexes.IMAGE_EXTENSIONS:
                image, offset, size = extension, place, length
        if not image:
            found = sorted(extension for extension, _, _ in index.members(sample))
            raise BadSample(f"no image member, only {found}", entry.name, key)
        try:
            if label is not None and label[1] > LARGEST_LABEL:
                raise BadLabel(f"label: the .{self.label_kind} member has {label[1]:,} bytes")
            # A label just before the image, as webdataset writes it, comes with the same read.
            near = label is not None and 0 < offset - label[0] <= NEAR
            text = None
            if label is not None and not near:
                text = bytes(self._member(entry, key, self.label_kind, *label))
            start = (label[0] if label is not None and near else offset) - BLOCK
            block = self._block(entry, start, offset + size)
            if label is not None and near:
                self._check_header(block, entry, f"{key}.{self.label_kind}", label[1])
                text = bytes(block[BLOCK : BLOCK + label[1]])
            self._check_header(block[offset - BLOCK - start :], entry, f"{key}.{image}", size)
            number = self._label(key, text) if self.images.labelled else -1
            return Sample(key, block[offset - start :], self.used - size, number, entry.name, offset)
        except BadSample as bad:
            raise type(bad)(bad.reason, entry.name, key, offset) from bad

    def take(self) -> np.ndarray:
        """The buffer with everything read since the last call, uint8; ``keep`` only."""
        taken = self.buffer[: self.used]
        # Not larger than needed: an allocation of one size again and again is mapped anew by the C library
        # each time, and mapping costs more than reading.
        self.buffer, self.used = np.empty(max(1 << 20, self.used + self.used // 8), np.uint8), 0
        return taken

    def members(self, source: int, shard: int, sample: int) -> dict[str, bytes]:
        """All members of a sample by extension, as copies."""
        entry = self.images.sources[source].shards[shard]
        index = self.indexes.get(entry.url, lambda: self._index(entry))
        key = index.key(sample)
        return {name: bytes(self._member(entry, key, name, *place)) for name, *place in index.members(sample)}

    def _index(self, shard: Shard) -> indexes.ShardIndex:
        index = indexes.read(shard.sidecar)
        if len(index) != shard.nsamples or index.summary.filesize != shard.filesize:
            raise StaleIndex(f"{shard.sidecar} changed while the run was reading {shard.url}: start the run again")
        return index

    def _open(self, shard: Shard) -> Opened:
        if not is_remote(shard.url):
            return Opened(os.open(Path(shard.url), os.O_RDONLY))
        assert self.images.cache is not None, "open_set refuses remote shards without a cache"
        return self.images.cache.open(shard.url, shard.filesize)

    def _member(self, shard: Shard, key: str, extension: str, offset: int, size: int) -> memoryview:
        """A member's bytes; its tar header is read along and checked, so damage cannot pass unnoticed."""
        block = self._block(shard, offset - BLOCK, offset + size)
        self._check_header(block, shard, f"{key}.{extension}", size)
        return block[BLOCK:]

    def _block(self, shard: Shard, start: int, end: int) -> memoryview:
        """The bytes [start, end) of a shard, in the buffer."""
        first = self.used if self.keep else 0
        self.used = first + end - start
        if self.used > len(self.buffer):
            larger = np.empty(max(self.used, 2 * len(self.buffer)), np.uint8)
            larger[:first] = self.buffer[:first]
            self.buffer = larger
        block = memoryview(self.buffer)[first : self.used]
        try:
            count = os.preadv(self._opened(shard).descriptor, [block], start)
        except OSError:
            # A stale handle of a network file system recovers by opening again; anything else fails again.
            self.files.forget(shard.url)
            try:
                count = os.preadv(self._opened(shard).descriptor, [block], start)
            except OSError as error:
                raise BadSample(f"cannot read: {error}") from error
        if count != len(block):
            raise BadSample(f"the shard ends early, {len(block) - count} bytes short of this sample's end")
        return block

    def _opened(self, shard: Shard) -> Opened:
        return self.files.get(shard.url, lambda: self._open(shard))

    @staticmethod
    def _check_header(block: memoryview, shard: Shard, name: str, size: int) -> None:
        header = bytes(block[:BLOCK])
        expected = name.encode("utf-8", "surrogateescape")
        if header.startswith(expected + b"\0") and header[124:135] == b"%011o" % size:
            return  # as every common writer has it
        expected = expected.lower()
        # A longer name, or one that is not ASCII, stands in a header before: only the size can be compared.
        same_name = len(expected) >= 100 or not name.isascii()
        same_name |= indexes.member_name(header).lower() == expected
        try:
            same_size = size >= LARGEST_OCTAL or indexes.number(header[124:136]) == size
        except ValueError:
            same_size = False
        if same_name and same_size:
            return
        fault = indexes.header_fault(header)
        if fault:
            raise BadSample(fault)
        raise StaleIndex(
            f"{shard.url}: the index says {name} ({size} bytes), the tar says "
            f"{indexes.member_name(header).decode(errors='replace')}. The tar was rewritten after it was "
            f"indexed: run `halfseen shards index --force` on it and start again"
        )

    def _label(self, key: str, content: bytes | None) -> int:
        """The class of a sample. content: of the label's member, None when there is none."""
        if self.images.label == "folder":
            folder = indexes.folder_of(key)
            text: object = self.folder_label.get(folder, folder)
            if not folder:
                raise BadLabel("no label: the key has no folder part, which data.label=folder reads")
        elif content is None:
            raise BadLabel(
                f"no label: member .{self.label_kind} is missing, which data.label={self.images.label} reads"
            )
        else:
            plain = content.decode("utf-8", "replace").strip()
            text = _json_value(plain, self.label_path) if self.label_path else plain
        try:
            label = int(text)  # type: ignore[call-overload]
        except (TypeError, ValueError):
            raise BadLabel(f"label {text!r} is not an integer") from None
        if not 0 <= label < self.images.classes:
            raise BadLabel(f"label {label} is outside 0..{self.images.classes - 1} (data.classes)")
        return label


def _json_value(text: str, path: str) -> object:
    """The value at a dotted path of a JSON text."""
    try:
        value = json.loads(text)
        for name in path.split("."):
            value = value[name]
    except (ValueError, KeyError, TypeError) as error:
        raise BadLabel(f"label: no {path!r} in the json member ({error!r})") from error
    return value
