"""``halfseen status``: runs and their jobs."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfseen.config import ConfigError

from . import jobs, records, slurm

DEPTH = 4  # folders below a named one in which runs are looked for


@dataclass(frozen=True)
class Seen:
    """One run at a glance."""

    folder: Path
    job: str = ""
    state: str = ""
    position: int = 0  # images, as last logged
    total: int = 0  # 0: not known
    speed: float = 0.0  # images per second
    checkpoint: str = ""
    restarts: int = 0
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)  # the last value of each logged number

    @property
    def left(self) -> float:
        """Seconds to the end at the last speed, 0 if not known."""
        return (self.total - self.position) / self.speed if self.total and self.speed else 0.0


def main(argv: Sequence[str]) -> int:
    """``halfseen status [RUN_OR_FOLDER ...]``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen status", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of them (runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object per run")
    given = parser.parse_args(argv)
    refuse_absent(given.folders)
    runs = [run for folder in given.folders for run in find(folder)]
    seen = look_together(runs)
    if given.json:
        for one in seen:
            print(json.dumps(vars(one) | {"folder": str(one.folder)}))
        return 0
    print("\n".join(lines(seen)) if seen else f"no runs in {', '.join(map(str, given.folders))}")
    return 0


def refuse_absent(folders: Sequence[Path]) -> None:
    """Raise ConfigError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("folder", str(folder), "there is no such folder", "name a run, or a folder of runs")


def find(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run folders in a folder, itself included; not what lies inside a run that is no run."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return  # another user's
    if (folder / "launch/task.json").is_file() or (folder / "metrics.jsonl").is_file():
        yield folder
    if depth:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in inside:
            if path.name not in ("checkpoints", "launch", "tensorboard", "heartbeat", "capsules"):
                yield from find(path, depth - 1)


def look_together(runs: Sequence[Path]) -> list[Seen]:
    """What run folders and Slurm say, asked once for all of them; the folders alone where Slurm does not answer."""
    stories = (records.story(run) for run in runs)
    numbers = [told.job for told in stories if told.job and told.cluster == "slurm" and not told.final]
    try:
        if numbers:
            slurm.refuse_absent()
        known, waits = slurm.states(numbers), slurm.waits(numbers)
    except (ConfigError, OSError) as error:
        reason = error.reason if isinstance(error, ConfigError) else error
        print(f"note: {reason}; this is what the folders say", file=sys.stderr)
        return [look(run, ask=False) for run in runs]
    return [look(run, known=known, waits=waits) for run in runs]


def look(
    folder: Path, *, known: dict[str, str] | None = None, waits: Mapping[str, str] | None = None, ask: bool = True
) -> Seen:
    """What a run folder and Slurm say.

    known, waits: states of jobs already asked for, and what pending ones wait for. ask=False: the folder alone.
    """
    told = records.story(folder)
    if known is None:
        known = slurm.states([told.job]) if ask and told.cluster == "slurm" and told.job else {}
    numbers = last_numbers(folder / "metrics.jsonl")
    position, speed = int(numbers.get("position") or 0), float(numbers.get("images_per_second") or 0.0)
    total = 0
    if (records.where(folder) / "task.json").is_file():
        total = int(json.loads((records.where(folder) / "task.json").read_text())["total"])
    answered = records.answered(folder)
    if answered:
        position, speed = min(answered, total or answered), answers_per_second(folder, told)
    reason = told.ended["reason"] if told.ended and not told.complete else "; ".join(told.reasons[-1:])
    if waits and told.job in waits:
        reason = "; ".join(filter(None, [f"waits: {waits[told.job]}", reason]))
    return Seen(
        folder,
        told.job,
        state_of(told, known.get(told.job, ""), ask),
        position,
        total,
        speed,
        f"{len(records.shards(folder))} shards" if answered else checkpoint(folder),
        max(0, len(told.starts) - 1),
        reason,
        numbers,
    )


def answers_per_second(folder: Path, told: records.Story) -> float:
    """Speed of the newest start of `halfseen teach`, start-up included; 0 before its first shard."""
    if not told.starts:
        return 0.0
    seconds = max(path.stat().st_mtime for path in records.shards(folder)) - told.starts[-1]["time"]
    return max(0.0, (records.answered(folder) - told.starts[-1]["position"]) / seconds) if seconds > 0 else 0.0


def state_of(told: records.Story, state: str, ask: bool = True) -> str:
    """One word: what the folder knows where it is final, else what Slurm says."""
    if not told.job:
        return "not launched"
    if told.ended and told.final:
        return str(told.ended["verdict"])
    if told.cluster == "slurm":
        if state in ("COMPLETED", "FAILED", "NODE_FAIL") or (ask and not state):
            return "gone"
        return state.lower() or ("running" if told.starts else "queued")
    return "running" if jobs.alive(told.job) else "gone"


def last_numbers(path: Path) -> dict[str, Any]:
    """The last value of every number in the end of a metrics.jsonl."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        rows = file.read().decode(errors="replace").splitlines()
    found: dict[str, Any] = {}
    for row in rows:
        try:
            found |= {name: value for name, value in json.loads(row).items() if value is not None}
        except (ValueError, AttributeError):  # the first one is cut; the last one may be half written
            continue
    return found


def checkpoint(folder: Path) -> str:
    """Position, age and soundness of the newest checkpoint; sizes are compared, not digests."""
    position = records.newest(folder)
    if not position:
        return "none"
    path = folder / "checkpoints" / f"img_{position:012d}"
    manifest = path / "manifest.json"
    try:
        files = json.loads(manifest.read_text())["files"]
        wrong = [name for name, entry in files.items() if (path / name).stat().st_size != entry["bytes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = [str(error)]
    age = clock(time.time() - manifest.stat().st_mtime)
    return f"{position:,}, {age} old, " + (f"DAMAGED: {wrong[0]}" if wrong else "whole")


def clock(seconds: float) -> str:
    """``3 h 20 min``."""
    minutes = int(seconds / 60)
    if minutes < 1:
        return f"{int(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def lines(seen: Sequence[Seen]) -> list[str]:
    """The table."""
    head = ("run", "job", "state", "images", "img/s", "left", "newest checkpoint", "restarts", "why")
    rows = [head]
    for one in seen:
        share = f" of {one.total:,} ({one.position / one.total:.0%})" if one.total else ""
        left = clock(one.left) if one.left and one.state == "running" else "-"
        rows.append(
            (
                os.path.relpath(one.folder),
                one.job or "-",
                one.state,
                f"{one.position:,}{share}",
                f"{one.speed:,.0f}" if one.speed else "-",
                left,
                one.checkpoint,
                str(one.restarts),
                one.reason,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
