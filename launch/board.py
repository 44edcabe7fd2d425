"""``halfseen board RUN ...``: TensorBoard over several runs, each under its own name."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from halfseen.config import ConfigError

from . import status


def main(argv: Sequence[str]) -> int:
    """Start TensorBoard; returns its exit code. What it does not know itself goes to TensorBoard."""
    parser = argparse.ArgumentParser(prog="halfseen board", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of them (runs)")
    given, rest = parser.parse_known_args(argv)
    if missing := [str(folder) for folder in given.folders if not folder.is_dir()]:
        raise ConfigError("folder", missing[0], "there is no such folder", "name a run, or a folder of runs")
    status.refuse_absent(given.folders)
    names = runs_of(given.folders)
    if not names:
        where = ", ".join(map(str, given.folders))
        raise ConfigError("folder", where, "holds no run with a tensorboard folder", "start one first")
    with tempfile.TemporaryDirectory("-halfseen-board") as folder:
        link(names, Path(folder))
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, *rest]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that nothing stays behind
        with subprocess.Popen(command) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.terminate()
                return 0


def runs_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Name in the board -> event folder, for every run in the folders."""
    found = [run.absolute() for folder in folders for run in status.find(folder) if (run / "tensorboard").is_dir()]
    root = os.path.commonpath([run.parent for run in found]) if found else ""
    return {os.path.relpath(run, root): run / "tensorboard" for run in found}


def link(names: dict[str, Path], folder: Path) -> None:
    """Give each event folder its name below one folder, which is what TensorBoard reads."""
    for name, target in names.items():
        place = folder / name.replace(os.sep, "-")
        place.symlink_to(target, target_is_directory=True)
