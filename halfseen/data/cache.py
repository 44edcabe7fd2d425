"""Node cache for remote shards: each is fetched once per node, published in one step, evicted by last use.

Every shard has a lock file. Readers hold it shared for as long as they may read, so eviction -- which must
get it exclusively -- never takes a shard in use. flock is node-local on network file systems: put the cache
on a local disk.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from halfseen.config import ConfigError
from halfseen.data import index as indexes

logger = logging.getLogger(__name__)

# Schemes webdataset.gopen serves with a program of its own; fsspec serves the rest (s3, gs, az, ...).
GOPEN_SCHEMES = frozenset(("pipe", "http", "https", "sftp", "ftps", "scp", "ais", "htgs", "hf"))


def is_remote(url: str) -> bool:
    """Whether a shard must be fetched before it can be read."""
    return url.startswith("pipe:") or "://" in url


def open_remote(url: str) -> Any:
    """A readable binary stream of a URL or ``pipe:`` command; a context manager."""
    scheme = urlparse(url).scheme
    if scheme in GOPEN_SCHEMES:
        from webdataset.gopen import gopen

        return gopen(url, "rb")
    try:
        import fsspec

        return fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:  # fsspec raises ValueError for a protocol nobody has registered
        raise ConfigError(
            "data.train", url, f"cannot open {scheme}:// ({error})", "pip install halfseen[remote]"
        ) from error


@dataclass(frozen=True)
class Opened:
    """A shard ready for pread; close it to let the cache evict it."""

    descriptor: int
    lock: int | None = None  # descriptor of the shared lock; None for a shard outside the cache

    def close(self) -> None:
        """Close the data first, then release the lock."""
        os.close(self.descriptor)
        if self.lock is not None:
            os.close(self.lock)


@dataclass(frozen=True)
class Cache:
    """A folder of fetched shards. limit: bytes of shards kept; 0: no limit."""

    folder: Path
    limit: int = 0

    def place(self, url: str) -> Path:
        """Where a URL's shard is kept: a hash, so that nothing in the URL becomes a path."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", urlparse(url).path if "://" in url else url)[-60:].lstrip("._-")
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable}"

    def open(self, url: str, filesize: int | None) -> Opened:
        """Fetch if needed and open for reading, holding the shard against eviction.

        filesize: what the index says; None where there is no index yet. Raises OSError when fetching fails.
        """
        place = self.place(url)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(f"{place}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if self._ready(place, filesize):
                    os.utime(place)  # last use, for eviction
                    return Opened(os.open(place, os.O_RDONLY), lock)
                fcntl.flock(lock, fcntl.LOCK_UN)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._ready(place, filesize):  # another process may have fetched it while this one waited
                    self._fetch(url, place, filesize)
        except BaseException:
            os.close(lock)
            raise

    def sidecar(self, url: str) -> tuple[Path, indexes.Summary]:
        """The index of a remote shard: kept here, else fetched from beside it, else built from the shard."""
        place = self.place(url)
        sidecar = self.folder / "indexes" / (place.name + indexes.SUFFIX)
        summary = indexes.read_summary(sidecar)
        if summary is None:
            sidecar.parent.mkdir(parents=True, exist_ok=True)
            with indexes.exclusive(self.folder / "indexes" / f"{place.name}.lock"):
                if indexes.read_summary(sidecar) is None and not self._fetch_sidecar(url, sidecar):
                    opened = self.open(url, None)
                    try:
                        indexes.write(indexes.build(place), sidecar)
                    finally:
                        opened.close()
            summary = indexes.read_summary(sidecar)
        if summary is None:
            raise OSError(f"the index of {url} in {sidecar} cannot be read; delete it and start again")
        if not summary.complete:
            logger.warning("%s: %s. %s bytes of it are NOT in the data set.", url, summary.fault, f"{summary.lost:,}")
        return sidecar, summary

    def _fetch_sidecar(self, url: str, sidecar: Path) -> bool:
        if url.startswith("pipe:"):
            return False
        temporary = sidecar.with_name(f".{sidecar.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file, open_remote(url + indexes.SUFFIX) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            if indexes.read_summary(temporary) is None:
                return False
            os.replace(temporary, sidecar)
            return True
        except OSError as error:
            logger.info("no index beside %s (%s): fetching the shard to make one", url, error)
            return False
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _ready(place: Path, filesize: int | None) -> bool:
        """Whether the shard is there; filesize: what it must have, None where that is not known."""
        try:
            size = place.stat().st_size
        except FileNotFoundError:
            return False
        return filesize is None or size == filesize

    def _fetch(self, url: str, place: Path, filesize: int | None) -> None:
        """Download under the exclusive lock. What an interrupted holder left is removed first."""
        for leftover in self.folder.glob(f"{place.name}.part-*"):
            leftover.unlink(missing_ok=True)
        self._evict(filesize or 0)
        temporary = Path(f"{place}.part-{os.getpid()}")
        try:
            with temporary.open("wb") as file, open_remote(url) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            self._check(url, temporary, filesize)
            os.replace(temporary, place)
        except OSError as error:  # stores name an object in their own way, or not at all
            raise error if url in str(error) else OSError(f"{url} cannot be fetched: {error!r}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _check(url: str, path: Path, filesize: int | None) -> None:
        size = path.stat().st_size
        if filesize is not None and size != filesize:
            raise OSError(f"{url} gave {size} bytes, its index says {filesize}: incomplete download, or a stale index")
        with path.open("rb") as file:
            fault = indexes.header_fault(file.read(indexes.BLOCK))
        if fault:
            raise OSError(f"{url} is no tar file ({fault})")

    def _evict(self, needed: int) -> None:
        """Remove least recently used shards until ``needed`` more bytes fit; shards in use stay."""
        if not self.limit:
            return
        with indexes.exclusive(self.folder / "evict.lock"):
            kept = sorted(self._shards(), key=lambda entry: entry[0])
            total = sum(size for _, size, _ in kept) + needed
            for _, size, path in kept:
                if total <= self.limit:
                    return
                with _unused(Path(f"{path}.lock")) as free:
                    if free:
                        path.unlink(missing_ok=True)
                        total -= size
            if total > self.limit:
                logger.warning(
                    "data.cache_gib=%.3g is too small: the shards in use take %.3g GiB",
                    self.limit / 2**30,
                    total / 2**30,
                )

    def _shards(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of every shard in the folder."""
        for lock in self.folder.glob("*-*.lock"):
            path = lock.with_suffix("")
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            yield status.st_mtime, status.st_size, path


@contextmanager
def _unused(lock: Path) -> Iterator[bool]:
    """Whether nobody holds a lock file; if so it is held exclusively meanwhile."""
    with lock.open("a") as file:
        free = _try_exclusive(file)
        yield free


def _try_exclusive(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
