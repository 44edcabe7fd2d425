"""What the evidence scripts share: ordinary ``halfseen`` commands, one after the other, each kept with its result.

A script is run again to continue: what has finished with the same command is not repeated.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfseen import receipt

# Changes no number: nothing is drawn, nothing is saved on the way, and the one evaluation is that of the end.
QUIET = ("run.checkpoint_every=100%", "run.picture_every=0", "monitor.tensorboard=false", "data.workers=0")
AT_END = "run.evaluate_every=100%"
METRICS = {
    "val/top1": "top1",
    "images": "images_evaluated",
    "val/mean_iou": "mean_iou",
    "val/pixel_accuracy": "pixel_accuracy",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One command, and the run's folder or the file it leaves."""

    name: str
    arguments: tuple[str, ...]
    made: Path

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["halfseen", *self.arguments])


class Record:
    """Commands and what came of them, in a file that is whole at every moment."""

    def __init__(self, path: Path, protocol: argparse.Namespace, table: Callable[["Record"], list[Row]]) -> None:
        """path: of the JSON. table: the rows that can be made of what has finished so far."""
        self.path, self.table = path, table
        self.protocol = {name: str(value) for name, value in vars(protocol).items() if name not in ("out", "rows")}
        self.runs: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.runs = json.loads(path.read_text())["runs"]

    def do(self, job: Job) -> None:
        """Run a command unless it has finished, and write down what came out; a failure ends the script."""
        if self.runs.get(job.name, {}).get("command") == job.command:
            return
        print(f"$ {job.command}", flush=True)
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "halfseen", *job.arguments])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"error: exit code {process.returncode} of {job.command}")
        self.runs[job.name] = {
            "command": job.command,
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "seconds": round(time.monotonic() - began, 1),
            "peak_mib": round(usage.ru_maxrss / 1024),
            **outcome(job.made),
        }
        self.write()

    def write(self) -> None:
        """The file."""
        content = {
            "protocol": self.protocol,
            "table": self.table(self),
            "runs": self.runs,
            "device": receipt.processor(),
            "versions": receipt.versions(),
            "source": receipt.source(),
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)

    def figures(self, names: Sequence[str], metric: str = "top1") -> Row | None:
        """Per cent of each of some runs, their mean and sample deviation; None until all have finished."""
        found = [self.runs.get(name) for name in names]
        if not all(found):
            return None
        values = [round(100 * run[metric], 2) for run in found if run]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return {metric: values, "mean": round(statistics.fmean(values), 2), "deviation": round(spread, 2)}


def outcome(made: Path) -> dict[str, Any]:
    """What a run's folder says at its end: its last evaluation, else its last scalars. Of a file: its size."""
    if made.suffix == ".json":
        return {"top1_at": {size: found["val/top1"] for size, found in json.loads(made.read_text())["sizes"].items()}}
    if made.is_file():
        return {"bytes": made.stat().st_size}
    if (made / "evaluation.json").is_file():
        found = json.loads((made / "evaluation.json").read_text())
        last = found.get("last", found)
        return {name: last[key] for key, name in METRICS.items() if key in last}
    if (made / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        return {"last": next(line for line in reversed(lines) if "loss" in line)}
    return {"bytes": sum(path.stat().st_size for path in made.rglob("*") if path.is_file())}


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--train", default="embedded:emoji/train", help="labelled shards (default %(default)s)")
    parser.add_argument("--val", default="embedded:emoji/val", help="shards to evaluate on (default %(default)s)")
    parser.add_argument("--label", default="folder", help="where a label is, as data.label (default %(default)s)")
    parser.add_argument("--classes", type=int, default=12, help="of the labels (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSON of everything measured")
    return parser
