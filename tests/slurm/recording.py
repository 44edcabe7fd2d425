"""``python recording.py -u -m MODULE ARGUMENTS``: like ``python``, for the ranks of a drill.

Writes the key of every image that enters a step beside its position to $DRILL_KEYS.JOB.RESTART.RANK, and waits
$DRILL_PACE seconds in each micro-batch, so that there is a step to interrupt on a fast machine too.
"""

import os
import runpy
import sys
import time


def record(path, pace):
    """Have what the stage does with each micro-batch also write down what is in it."""
    from halfseen.pretrain import train

    prepare = train.Prepare.__call__

    def recorded(self, batch):
        lines = [f"{position}\t{key}\n" for position, key in zip(batch["position"].tolist(), batch["key"], strict=True)]
        with open(path, "a") as out:  # one write: a kill cannot tear a line that the next one would continue
            out.write("".join(lines))
        time.sleep(pace)
        return prepare(self, batch)

    train.Prepare.__call__ = recorded


if __name__ == "__main__":
    module, arguments = sys.argv[sys.argv.index("-m") + 1], sys.argv[sys.argv.index("-m") + 2 :]
    if "DRILL_KEYS" in os.environ and module != "halfseen.launch.after":
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID", "RANK")
        name = ".".join(os.environ.get(name, "0") for name in names)
        record(f"{os.environ['DRILL_KEYS']}.{name}", float(os.environ.get("DRILL_PACE", "0")))
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
