"""``python recorder.py FILE ARGUMENTS...``: ``halfseen pretrain ARGUMENTS``, with the key of every image that enters a
step written beside its position, one line each, to FILE.RANK."""

import os
import sys

from halfseen.cli import run_stage
from halfseen.pretrain import train


def record(path):
    """Have what the stage does with each micro-batch also write down what is in it."""
    prepare = train.Prepare.__call__

    def recorded(self, batch):
        # One write for each micro-batch: a kill cannot tear a line that the next one would continue.
        lines = [f"{position}\t{key}\n" for position, key in zip(batch["position"].tolist(), batch["key"], strict=True)]
        with open(path, "a") as out:
            out.write("".join(lines))
        return prepare(self, batch)

    train.Prepare.__call__ = recorded


if __name__ == "__main__":
    record(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
    run_stage(train.main, sys.argv[2:])
