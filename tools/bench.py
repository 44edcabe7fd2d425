"""``halfseen bench step|table|data|augment|finetune|engine|distill ...``: which benchmark, nothing else."""

import importlib
import sys
from collections.abc import Sequence

BENCHES = {
    "step": ("halfseen.tools.bench_step", "training step of a recipe: images/s, memory, MFU; --against peers"),
    "table": ("halfseen.tools.bench_table", "a table of GPUs: engines at their best micro-batch, beside peers"),
    "finetune": ("halfseen.tools.bench_finetune", "full against attention-only fine-tuning: time, memory, bytes"),
    "engine": ("halfseen.tools.bench_engine", "each engine's step over the plain one; what checkpoints cost"),
    "distill": ("halfseen.tools.bench_distill", "what a teacher costs, what a store and shared weights save"),
    "augment": ("halfseen.tools.bench_augment", "each augmentation, in a worker and on the device"),
    "data": ("halfseen.tools.bench_data", "index, bytes, decode, loader and resume; against stock WebDataset"),
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns its exit code."""
    if not argv or argv[0] not in BENCHES:
        asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
        text = "usage: halfseen bench BENCH ...\n\n"
        text += "".join(f"  {name:<8} {what}\n" for name, (_, what) in BENCHES.items())
        print(text, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    return importlib.import_module(BENCHES[argv[0]][0]).main(list(argv[1:]))
