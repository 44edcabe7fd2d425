"""``python recording.py -u -m MODULE ARGUMENTS``: like ``python``, for the ranks of a drill.

Writes the key of every image that enters a step beside its position to $DRILL_KEYS.JOB.RESTART.RANK. While the file
$DRILL_HOLD names a position, no step from there on begins, unless the rank has been asked to stop: however quick the
machine, there is a step to interrupt.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path


def record(path, hold):
    """Have what the stage does with each micro-batch also write down what is in it, and wait before it."""
    from halfseen.pretrain import train

    prepare = train.Prepare.__call__

    def recorded(self, batch):
        lines = [f"{position}\t{key}\n" for position, key in zip(batch["position"].tolist(), batch["key"], strict=True)]
        with open(path, "a") as out:  # one write: a kill cannot tear a line that the next one would continue
            out.write("".join(lines))
        while limit(hold) <= int(batch["position"][0]) and not asked():
            time.sleep(0.05)
        return prepare(self, batch)

    train.Prepare.__call__ = recorded


def limit(hold):
    """The position that no step may begin at or behind; beyond every run where nothing is held."""
    try:
        return int(Path(hold).read_text())
    except FileNotFoundError:
        return sys.maxsize


def asked():
    """Whether the loop has heard a signal."""
    return getattr(getattr(signal.getsignal(signal.SIGUSR2), "__self__", None), "number", 0)


if __name__ == "__main__":
    module, arguments = sys.argv[sys.argv.index("-m") + 1], sys.argv[sys.argv.index("-m") + 2 :]
    if "DRILL_KEYS" in os.environ and module != "halfseen.launch.after":
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID", "RANK")
        name = ".".join(os.environ.get(name, "0") for name in names)
        record(f"{os.environ['DRILL_KEYS']}.{name}", os.environ["DRILL_HOLD"])
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
