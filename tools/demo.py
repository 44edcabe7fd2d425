"""``halfseen demo``: pretrain, fine-tune, and compare with training from scratch, on the embedded images.

It only runs commands that a user would type -- the ordinary stages with the recipes pretrain/demo,
finetune/demo and finetune/demo_scratch -- and prints each one, so that the demo is also a tutorial.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from halfseen.signals import SAVED
from halfseen.writing import write_whole

from .reconstruct import main as reconstruct
from .terminal import console

PRETRAINED, SCRATCH = "pretrained", "scratch"
RECIPES = {SCRATCH: "finetune/demo_scratch", PRETRAINED: "finetune/demo"}
RESULTS = "demo.json"  # in the demo's folder: command, seconds and accuracy of every finished run
MOST_THREADS = 4  # per process; the demo's matrices are too small to feed more

# --quick: the same commands with a tiny trunk on a few images. It shows that everything works, nothing else.
_TINY = ("model.width=32", "model.depth=2", "model.heads=2", "data.limit=64", "run.images=64")
QUICK = {
    "pretrain": (*_TINY, "objective.mae.decoder_width=32", "run.global_batch=16"),
    "finetune": (*_TINY, "run.global_batch=16"),
}


class Stopped(Exception):
    """The user asked to stop; every stage has saved."""


@dataclass(frozen=True)
class Command:
    """One run of a stage."""

    stage: str  # pretrain or finetune
    folder: Path
    options: tuple[str, ...]  # recipe and overrides, without run.folder
    needs: "Command | None" = None  # what must have finished before

    @property
    def arguments(self) -> list[str]:
        """What follows the stage's name."""
        return [*self.options, f"run.folder={self.folder}"]

    @property
    def text(self) -> str:
        """As a user would type it."""
        return shlex.join(["halfseen", self.stage, *self.arguments])

    @property
    def log(self) -> Path | None:
        """Where its output goes: pretraining, the longest run, is shown; what runs beside it is not."""
        return None if self.stage == "pretrain" else self.folder / "console.log"

    def start(self, threads: int) -> subprocess.Popen[bytes]:
        """Start it in a process of its own."""
        program = [sys.executable, "-m", f"halfseen.{self.stage}", *self.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if self.log is None:
            return subprocess.Popen(program, env=environment)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as file:
            return subprocess.Popen(program, env=environment, stdout=file, stderr=subprocess.STDOUT)


class Results:
    """What has finished, kept in a file, so that a second call continues where the first one stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, command: Command) -> bool:
        """Whether this very command has finished."""
        return self.entry(command).get("command") == command.text

    def entry(self, command: Command) -> dict[str, Any]:
        """What is known of a command's run; empty before it has finished."""
        return self.entries.get(command.folder.name, {})

    def add(self, command: Command, seconds: float) -> None:
        """Record a finished run. Its accuracy is the one after the last step, not the best on the way."""
        entry: dict[str, Any] = {"command": command.text, "seconds": round(seconds, 1)}
        if command.stage == "finetune":
            last = json.loads((command.folder / "evaluation.json").read_text())["last"]
            entry |= {"top1": last["val/top1"], "images": last["images"]}
        self.entries[command.folder.name] = entry
        write_whole(self.path, json.dumps(self.entries, indent=2) + "\n")


def main(argv: Sequence[str]) -> int:
    """Run the demo, or what is left of it. Returns 0, a failed stage's code, or 75 when asked to stop."""
    arguments = parse(argv)
    screen, folder = console(), arguments.folder
    pretraining, finetunings = plan(folder, arguments.seeds, arguments.quick)
    results = Results(folder / RESULTS)
    screen.print("Pretrain without labels, train from scratch beside it, then fine-tune what was pretrained.\n")
    try:
        with terminable():
            code = run_all([pretraining, *finetunings], results, screen)
    except Stopped:
        screen.print("\nstopped; run the same command again to continue")
        return SAVED
    if code == 0:
        code = reconstruct([str(pretraining.folder), "--out", str(folder / "reconstruction.png")])
    if code == 0:
        report(results, pretraining, finetunings, folder, screen)
        if arguments.quick:
            screen.print("--quick: far too short for the numbers to mean anything")
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("halfseen demo", description="pretrain, fine-tune, compare with scratch")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for runs (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of each kind (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to test the machinery")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    return arguments


def plan(folder: Path, seeds: int, quick: bool) -> tuple[Command, list[Command]]:
    """The pretraining, and a fine-tuning of each kind for every seed."""
    extra = QUICK if quick else {"pretrain": (), "finetune": ()}
    pretraining = Command("pretrain", folder / "pretrain", ("pretrain/demo", *extra["pretrain"]))
    start = {SCRATCH: (), PRETRAINED: (f"run.init={pretraining.folder}",)}
    needs = {SCRATCH: None, PRETRAINED: pretraining}
    finetunings = [
        Command(
            "finetune",
            folder / f"{kind}-{seed}",
            (recipe, f"run.seed={seed}", *start[kind], *extra["finetune"]),
            needs[kind],
        )
        for kind, recipe in RECIPES.items()
        for seed in range(seeds)
    ]
    return pretraining, finetunings


# --------------------------------------------------------------------------------------------------- running


def processors() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def terminable() -> Iterator[None]:
    """While entered, SIGTERM stops us as Ctrl-C does, so that the stages are told and can save."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(commands: Sequence[Command], results: Results, screen: Console) -> int:
    """Run what is not done yet, side by side as far as there are cores; returns the first failure's code or 0.

    One thread per process as long as there are more commands than cores: matrices this small leave a second
    thread idle half of the time. Raises Stopped when a signal ended one of them or us.
    """
    waiting = [command for command in commands if not results.done(command)]
    for command in commands:
        if command not in waiting:
            screen.print(f"done before: {command.folder}")
    together = max(1, min(processors(), len(waiting)))
    threads = min(MOST_THREADS, max(1, processors() // together))
    running: dict[subprocess.Popen[bytes], tuple[Command, float]] = {}
    try:
        while waiting or running:
            ready = [command for command in waiting if command.needs is None or results.done(command.needs)]
            for command in ready[: together - len(running)]:
                waiting.remove(command)
                say(screen, f"$ {command.text}")
                running[command.start(threads)] = (command, time.monotonic())
            for process in [process for process in running if process.poll() is not None]:
                command, began = running.pop(process)
                if process.returncode:
                    return failed(process.returncode, command, screen)
                results.add(command, time.monotonic() - began)
                if command.stage == "finetune":
                    say(screen, f"{command.folder.name}: top-1 {results.entry(command)['top1']:.1%}")
            time.sleep(0.1)
    except KeyboardInterrupt:
        raise Stopped from None
    finally:
        # Something still runs here only after a signal or a failure; a stage saves when it is told to end.
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return 0


def say(screen: Console, text: str) -> None:
    """Print a line, over the progress bar that pretraining may be drawing on the same terminal."""
    if screen.is_terminal:
        screen.file.write("\r\x1b[K")
    screen.print(text, markup=False, soft_wrap=True)


def failed(code: int, command: Command, screen: Console) -> int:
    """Say how a command failed and return its code; raises Stopped if it only saved and stopped."""
    if code == SAVED:
        raise Stopped
    say(screen, f"failed with exit code {code}: {command.text}")
    if command.log is not None:
        say(screen, f"the end of {command.log}:")
        say(screen, "\n".join(command.log.read_text(errors="replace").splitlines()[-15:]))
    return code


# ------------------------------------------------------------------------------------------------- reporting


def report(
    results: Results, pretraining: Command, finetunings: Sequence[Command], folder: Path, screen: Console
) -> None:
    """The table, and where everything lies."""
    images = results.entry(finetunings[0])["images"]
    scratch, pretrained = (accuracies(results, finetunings, kind) for kind in (SCRATCH, PRETRAINED))
    screen.print(f"\n[bold]Top-1 in per cent[/] on {images} images of things never drawn in training")
    screen.print(comparison(scratch, pretrained))
    minutes = results.entry(pretraining)["seconds"] / 60
    screen.print(
        "Both columns: same labels, images, epochs and augmentation; each at its own best learning rate.\n"
        f"Pretraining took {minutes:.1f} minutes on top and used no label.\n",
    )
    board = Path(sys.executable).with_name("tensorboard")
    screen.print(f"picture      {folder / 'reconstruction.png'} (masked | reconstructed | original)", soft_wrap=True)
    screen.print(f"TensorBoard  {board} --logdir {folder}", soft_wrap=True)
    screen.print("your images  halfseen shards build --help", soft_wrap=True)


def accuracies(results: Results, finetunings: Sequence[Command], kind: str) -> list[float]:
    """Top-1 in per cent of the fine-tunings of one kind, by seed."""
    chosen = [command for command in finetunings if command.folder.name.startswith(f"{kind}-")]
    return [100 * float(results.entry(command)["top1"]) for command in chosen]


def comparison(scratch: Sequence[float], pretrained: Sequence[float]) -> Table:
    """Seeds as rows; mean and standard deviation over them below."""
    difference = [after - before for before, after in zip(scratch, pretrained)]
    table = Table()
    table.add_column("seed")
    for name in ("from scratch", "pretrained", "difference"):
        table.add_column(name, justify="right")
    for seed, (before, after, gain) in enumerate(zip(scratch, pretrained, difference)):
        table.add_row(str(seed), f"{before:.1f}", f"{after:.1f}", f"{gain:+.1f}")
    table.add_section()
    table.add_row("mean ± std", summary(scratch), summary(pretrained), summary(difference, "+"))
    return table


def summary(values: Sequence[float], sign: str = "") -> str:
    """The mean and, of several values, their sample standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
