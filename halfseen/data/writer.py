"""Writes a shard with webdataset's writer, its index alongside, and publishes both in one step."""

import os
from pathlib import Path
from types import TracebackType

from webdataset.writer import TarWriter

from halfseen.data import index as indexes


class ShardWriter:
    """One shard: a context manager that leaves either a finished tar with its index, or nothing."""

    def __init__(self, path: Path) -> None:
        """path: the finished tar. Its folder must exist."""
        self.path = path
        self.temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
        self.builder = indexes.IndexBuilder()
        self.file = self.temporary.open("wb")
        # mtime=0: a fractional time would cost a 1 KB header per member. PAX_FORMAT stays plain ustar while
        # names fit.
        self.tar = TarWriter(self.file, encoder=False, mtime=0, format="PAX_FORMAT")

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample. members: extension -> content; written in sorted order."""
        for extension in sorted(members):
            self.tar.write({"__key__": key, extension: members[extension]})
            size = len(members[extension])
            padded = -(-size // indexes.BLOCK) * indexes.BLOCK
            self.builder.add(f"{key}.{extension}", self.tar.tarstream.offset - padded, size)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tar.close()
        self.file.close()
        if error is not None:
            self.temporary.unlink()
            return
        index = self.builder.finish(self.temporary.stat().st_size)
        os.replace(self.temporary, self.path)
        indexes.write(index, self.path.with_name(self.path.name + indexes.SUFFIX))
