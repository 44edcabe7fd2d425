"""What a run folder says about its jobs: RUN/launch.

RUN/launch/
    launch.yaml             the resources, as resolved
    task.json               the task: stage, arguments, code
    config-1a2b3c4d.yaml    what the stage's recipe and overrides state, named by its content
    events.jsonl            queued, started, ended; one line each, only appended
    why-JOB.json            exit code and error of the rank that ended first, of a start that did not complete
    stop                    written by `halfseen stop`: save, and do not start again
    JOB/                    the batch script and one log per rank

No torch in here: it is read at the end of a batch script and by commands that must answer at once.
"""

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The names of halfseen/checkpoint/folder.py, repeated because that package imports torch, which takes seconds.
_CHECKPOINT = re.compile(r"img_(\d{12,})")


def where(folder: Path | str) -> Path:
    """The folder of a run's launch records."""
    return Path(folder) / "launch"


def newest(folder: Path | str) -> int:
    """Position of the newest published checkpoint of a run, 0 if there is none."""
    names = Path(folder, "checkpoints").glob("img_*/manifest.json")
    return max((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name.parent.name))), default=0)


def reached(folder: Path | str) -> int:
    """Images that a start need not repeat: up to the newest checkpoint, or answered in a store of `halfseen teach`."""
    return answered(folder) or newest(folder)


def answered(folder: Path | str) -> int:
    """Images answered in a store of `halfseen teach`, 0 if the folder is none. Its shards are whole: the last one may
    reach beyond what was asked for."""
    store = Path(folder) / "store.json"
    if not store.is_file():
        return 0
    return int(json.loads(store.read_text())["store.shard_images"]) * len(shards(folder))


def shards(folder: Path | str) -> list[Path]:
    """The shards that a store of `halfseen teach` has so far."""
    return list(Path(folder).glob("positions-*.tar"))


def attempt() -> str:
    """Job and restart of this process: ``4711`` for the first start, ``4711.2`` after two requeues."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    if array:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return os.environ.get("SUBMITIT_LOCAL_JOB_ID", "") or f"process-{os.getpid()}"
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return job if restart == "0" else f"{job}.{restart}"


def job_of(attempt: str) -> str:
    """The job's number in an attempt."""
    return attempt.partition(".")[0]


def add(folder: Path | str, event: str, **values: Any) -> None:
    """Append one event. One short write to a file opened for appending: writers on two nodes do not mix."""
    path = where(folder) / "events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": round(time.time(), 1), **values}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def events(folder: Path | str) -> list[dict[str, Any]]:
    """Every event, oldest first. A line cut short by a full disk is left out."""
    path = where(folder) / "events.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(dict(json.loads(line)))
        except ValueError:
            continue
    return found


def say_why(folder: Path | str, attempt: str, code: int, text: str) -> None:
    """Keep how a start ended. The first rank to end is right: the others end because of it, and srun, which then ends
    them, returns the largest of their codes."""
    path = where(folder) / f"why-{attempt}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            file.write(json.dumps({"code": code, "text": text.strip()}) + "\n")
    except FileExistsError:
        pass


def why(folder: Path | str, attempt: str) -> tuple[int | None, str]:
    """Exit code and text that ``say_why`` kept; None and empty if no rank could."""
    path = where(folder) / f"why-{attempt}.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or cut short by what ended the rank
        return None, ""
    return int(content["code"]), str(content["text"])


def ask_to_stop(folder: Path | str, job: str) -> None:
    """Leave word that a job must not be started again."""
    (where(folder) / "stop").write_text(job + "\n")


def take_back_stop(folder: Path | str) -> None:
    """Forget ``ask_to_stop``."""
    (where(folder) / "stop").unlink(missing_ok=True)


def asked_to_stop(folder: Path | str, job: str) -> bool:
    """Whether ``ask_to_stop`` was called for this job."""
    path = where(folder) / "stop"
    return path.exists() and path.read_text().strip() == job


def fruitless(starts: list[dict[str, Any]], position: int) -> int:
    """How many of the last starts in a row have not brought a newer checkpoint.

    starts: "started" events, oldest first. position: of the newest checkpoint now.
    """
    count = 0
    for start in reversed(starts):
        if start["position"] < position:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Story:
    """A run's launches so far."""

    job: str = ""  # number of the newest job, empty if it was never queued
    cluster: str = ""
    ended: dict[str, Any] | None = None  # the newest job's last "ended", if nothing came after it
    starts: list[dict[str, Any]] = field(default_factory=list)  # since the last launch by hand
    reasons: list[str] = field(default_factory=list)  # why it was started again, oldest first

    @property
    def final(self) -> bool:
        """Whether its newest job has ended for good, in a way that the folder knows."""
        return self.ended is not None and self.ended["verdict"] in ("complete", "failed", "stopped", "saved")

    @property
    def complete(self) -> bool:
        """Whether it reached its end."""
        return self.ended is not None and self.ended["verdict"] == "complete"


def story(folder: Path | str) -> Story:
    """Read a run's events."""
    job, cluster, ended, running = "", "", None, False
    starts: list[dict[str, Any]] = []
    reasons: list[str] = []
    for event in events(folder):
        if event["event"] == "queued":
            job, cluster = event["job"], event["cluster"]
            if starts and job_of(starts[-1]["attempt"]) == job:
                continue  # it started before this line was written
            ended = None
            if not event.get("again"):
                starts, reasons, running = [], [], False
        elif event["event"] == "started":
            if ended and ended["verdict"] == "left":
                reasons.append(ended["reason"])
            if running:
                reasons.append("lost without a word (node failure, kill, or requeued by Slurm)")
            starts.append(event)
            ended, running = None, True
        elif event["event"] == "ended":
            ended, running = event, False
            if event["verdict"] in ("requeue", "resubmit"):
                reasons.append(event["reason"])
    return Story(job, cluster, ended, starts, reasons)
