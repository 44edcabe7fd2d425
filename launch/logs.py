"""``halfseen logs RUN``: what its job printed."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from halfseen.config import ConfigError

from . import jobs, records


def main(argv: Sequence[str]) -> int:
    """Print, or follow, one rank's log; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen logs", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--rank", type=int, default=0, help="whose log (0; it holds the batch script's lines too)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended, over restarts too")
    parser.add_argument("-n", "--lines", type=int, default=0, help="only the last so many lines; 0: all")
    given = parser.parse_args(argv)
    told = records.story(given.run)
    if not told.job:
        raise ConfigError("run", str(given.run), "was never launched", "see `halfseen launch --help`")
    path = file_of(given.run, told.job, given.rank)
    if given.follow:
        follow(given.run, given.rank, given.lines)
    elif not path.exists():
        raise ConfigError("run", str(given.run), f"job {told.job} has no log yet", "see `halfseen status`; or use -f")
    else:
        sys.stdout.write(tail(path.read_text(errors="replace"), given.lines))
    return 0


def file_of(run: Path, job: str, rank: int) -> Path:
    """The log of one rank. A sweep's logs lie in the sweep's folder."""
    queued = [event for event in records.events(run) if event["event"] == "queued" and event["job"] == job]
    base = queued[-1].get("logs", run) if queued else run
    name, folder = f"{job}_{rank}_log.out", records.where(base)
    # A job of submitit has a folder, an element of an array that of the array, a plain batch script none.
    places = [folder / job / name, folder / job.partition("_")[0] / name, folder / name]
    return next((path for path in places if path.exists()), places[0])


def tail(text: str, lines: int) -> str:
    """The last lines of a text, all for 0."""
    return "".join(text.splitlines(keepends=True)[-lines:]) if lines else text


def follow(run: Path, rank: int, lines: int, pause: float = 0.5) -> None:
    """Print what is added until no job is active; goes over to the next job of a resubmission."""
    shown, offset = None, 0
    while True:
        active = jobs.may_be_active(run)
        path = file_of(run, records.story(run).job, rank)
        if path != shown:
            shown, offset = path, 0
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read()
            offset += len(new)
            sys.stdout.write(tail(new.decode(errors="replace"), lines))
            sys.stdout.flush()
            lines = 0
        if not active:
            return
        time.sleep(pause)
