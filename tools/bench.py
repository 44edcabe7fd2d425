"""``halfseen bench step|data ...``: which benchmark, nothing else."""

import importlib
import sys
from collections.abc import Sequence

BENCHES = {
    "step": ("halfseen.tools.bench_step", "training step of a recipe: images/s, memory, MFU; --against peers"),
    "data": ("halfseen.tools.bench_data", "index, bytes, decode, loader and resume; against stock WebDataset"),
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns its exit code."""
    if not argv or argv[0] not in BENCHES:
        asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
        text = "usage: halfseen bench BENCH ...\n\n"
        text += "".join(f"  {name:<6} {what}\n" for name, (_, what) in BENCHES.items())
        print(text, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    return importlib.import_module(BENCHES[argv[0]][0]).main(list(argv[1:]))
