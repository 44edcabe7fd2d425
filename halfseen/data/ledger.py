"""The record of bad samples, and the limit above which a run stops."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FREE = 10  # bad samples that are let pass before the share counts, so that a short run is not stopped by one


@dataclass(frozen=True)
class BadRecord:
    """One bad sample, as it stands in ledger.jsonl."""

    position: int  # where in the run it would have come
    attempt: int  # 0: the planned sample; n: the n-th replacement was bad too
    shard: str
    key: str
    offset: int  # of the image in the shard in bytes; -1 where unknown
    reason: str

    def words(self) -> str:
        """For an error's message."""
        return f"{self.shard}, {self.key} at byte {self.offset}: {self.reason}"


class TooManyBad(RuntimeError):
    """The share of bad samples is above data.bad_limit, or no usable one is found in place of a bad one."""


class Ledger:
    """Appends records, counts them, and refuses to go on above the limit.

    Every rank writes its own whole lines to one file. It is read back at a restart: lines below the position where
    the run goes on count, of all ranks, and those beyond it are not written again.
    """

    def __init__(self, path: Path | None, limit: float, start: int = 0) -> None:
        """path: ledger.jsonl, or None to only count. limit: largest share of bad samples (data.bad_limit).

        start: position from which on samples are met now.
        """
        self.path, self.limit, self.start = path, limit, start
        self.bad = 0  # on all ranks before start, and on this one since
        self.ahead: set[tuple[int, int, str, str]] = set()  # written by a run that was killed further on
        text = path.read_text() if path is not None and path.exists() else ""
        self.torn = bool(text) and not text.endswith("\n")  # a line cut short when its writer was killed
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["position"] < start:
                self.bad += 1
            else:
                self.ahead.add((row["position"], row["attempt"], row["shard"], row["key"]))

    def record(self, records: Sequence[BadRecord], consumed: int) -> None:
        """Write records and check the limit. consumed: images this rank has taken since ``start``."""
        fresh = [
            record
            for record in records
            if (record.position, record.attempt, record.shard, record.key) not in self.ahead
        ]
        if fresh and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = "\n" * self.torn + "".join(json.dumps(asdict(record)) + "\n" for record in fresh)
            self.torn = False
            # One write to a file opened for appending: lines of different ranks never mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        self.bad += len(records)
        images = self.start + consumed
        if records and self.bad > max(self.limit * images, FREE if self.limit > 0 else 0):
            raise TooManyBad(
                f"{self.bad} bad samples among {images} images, above data.bad_limit={self.limit}. Last: "
                f"{records[-1].words()}. "
                f"{f'All are listed in {self.path}. ' if self.path else ''}"
                "Run `halfseen shards check` on the shards, repair them, or raise data.bad_limit."
            )
