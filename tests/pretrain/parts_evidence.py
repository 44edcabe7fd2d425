"""Measures what is lost when only a part of a trunk is tuned at a larger size: all, attention, head, from one start.

python tests/pretrain/parts_evidence.py FOLDER --train SHARDS --val SHARDS --label cls --classes K --out FILE.json

MAE at 64 pixels, fine-tuning whole at 64, then each part at 96, and what the change takes on disk as a delta. Every
command is in the file. Run it again to continue: what has finished is not repeated.
"""

import argparse
from pathlib import Path

from evidence import AT_END, QUIET, Job, Record, Row, parser_of

PARTS = ("all", "attention", "head")
START = "whole_64"


def main() -> None:
    """Measure, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--limit", type=int, default=3000, help="labelled images, as data.limit (default %(default)s)")
    arguments = parser.parse_args()
    record = Record(arguments.out, arguments, table)
    for job in prepared(arguments):
        record.do(job)
    for seed in range(arguments.seeds):
        for part in PARTS:
            record.do(tuning(arguments, part, seed))
            record.do(delta(arguments, part, seed))
    for found in table(record):
        print(f"{found['part']:<12} {found['mean']:.1f} ± {found['deviation']:.1f}  {found['top1']}")


def prepared(arguments: argparse.Namespace) -> list[Job]:
    """The common start: pretrained on all images without labels, fine-tuned whole, and merely shown the larger size."""
    pretrained, start, shown = (arguments.folder / name for name in ("pretrained", START, "shown.json"))
    sizes = ("data.image_size=64", "run.images=12ep", "run.global_batch=64")
    begun = ("pretrain", "pretrain/demo", f"data.train={arguments.train}", "data.val=null", *sizes, *QUIET)
    whole = (f"run.init={pretrained}", "data.image_size=64", "run.images=4ep", "optim.lr=2e-3", "run.seed=0")
    return [
        Job("pretrained", (*begun, f"run.folder={pretrained}"), pretrained),
        Job(START, (*tuned(arguments, *whole), f"run.folder={start}"), start),
        Job("shown", ("evaluate", str(start), "--sizes", "64,96", "--json", str(shown)), shown),
    ]


def tuned(arguments: argparse.Namespace, *options: str) -> tuple[str, ...]:
    """A fine-tuning on the labelled images."""
    data = (f"data.train={arguments.train}", f"data.val={arguments.val}", f"data.limit={arguments.limit}")
    labels = (f"data.label={arguments.label}", f"data.classes={arguments.classes}")
    return ("finetune", "finetune/demo", *data, *labels, "run.global_batch=64", *options, *QUIET, AT_END)


def tuning(arguments: argparse.Namespace, part: str, seed: int) -> Job:
    """One more epoch at the larger size, at one rate for every part."""
    folder = Path(arguments.folder) / f"{part}-{seed}"
    start = (f"run.init={arguments.folder / START}", "data.image_size=96", "run.images=1ep", "optim.lr=5e-4")
    own = (f"task.train={part}", f"run.seed={seed}")
    return Job(folder.name, (*tuned(arguments, *start, *own), f"run.folder={folder}"), folder)


def delta(arguments: argparse.Namespace, part: str, seed: int) -> Job:
    """What the tuning changed, as a file."""
    made = Path(arguments.folder) / f"{part}-{seed}.safetensors"
    runs = (str(arguments.folder / START), str(made.with_suffix("")))
    return Job(made.name, ("delta", "make", *runs, str(made)), made)


def table(record: Record) -> list[Row]:
    """Rows that have finished."""
    rows = []
    for part in PARTS:
        names = [f"{part}-{seed}" for seed in range(int(record.protocol["seeds"]))]
        if (figures := record.figures(names)) and (file := record.runs.get(f"{names[-1]}.safetensors")):
            runs = [record.runs[name] for name in names]
            cost = {key: round(sum(run[key] for run in runs) / len(runs), 1) for key in ("cpu_seconds", "peak_mib")}
            rows.append({"part": part} | figures | cost | {"delta_bytes": file["bytes"]})
    return rows


if __name__ == "__main__":
    main()
