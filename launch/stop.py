"""``halfseen stop RUN``: let its job save and end; it is not started again."""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from . import jobs, records, slurm, status


def main(argv: Sequence[str]) -> int:
    """Stop every named run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen stop", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders of them (a chain, a sweep)")
    parser.add_argument(
        "--now", action="store_true", help="end it at once: what came after the last checkpoint is lost"
    )
    given = parser.parse_args(argv)
    status.refuse_absent(given.folders)
    stopped = [stop(run, now=given.now) for folder in given.folders for run in status.find(folder)]
    if not any(stopped):
        print("nothing is queued or running there")
    return 0


def stop(folder: Path, *, now: bool) -> bool:
    """Stop one run's job; False if there is none."""
    job, state = jobs.active(folder)
    if not job:
        return False
    records.ask_to_stop(folder, job)
    local = records.story(folder).cluster == "local"
    if local:
        # submitit's controller passes SIGTERM on to the ranks; SIGINT ends them.
        os.kill(int(job), signal.SIGINT if now else signal.SIGTERM)
    else:
        try:
            slurm.cancel(job, *(["USR2"] if state == "RUNNING" and not now else []))
        except OSError:  # another user's: it must not stop later either, when nobody thinks of this
            records.take_back_stop(folder)
            raise
    how = "ended" if now or (state != "RUNNING" and not local) else "asked to save and end"
    print(f"{folder}: job {job} {how}; `halfseen launch` continues it")
    return True
