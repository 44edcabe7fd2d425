"""Measures what each part of a distillation is worth to a small student: accuracy over some seeds, budgets equal.

python tests/pretrain/distillation_evidence.py FOLDER --out FILE.json

Losses one by one, a start from the teacher's weights, masked images at the same time, and a store of fewer views than
the run is long. Every command is in the file. Run it again to continue: what has finished is not repeated.
"""

import argparse
from pathlib import Path

from evidence import AT_END, QUIET, Job, Record, Row, parser_of

TEACHER, SHARED = "teacher", "shared.safetensors"
# The demo's MAE, and the proportions of SimMIM on a grid of 6 x 6 patches; both with weight 1, which was not tuned.
MAE = (
    *("mim.weight=1", "mim.form=mae", "mim.mask.ratio=0.75", "mim.target.normalise=true", "mim.target.error=square"),
    *("mim.mae.decoder_width=64", "mim.mae.decoder_depth=2", "mim.mae.decoder_heads=2"),
)
SIMMIM = ("mim.weight=1", "mim.mask.kind=coarse", "mim.mask.cell=16", "mim.mask.ratio=0.6")
LABELS = ("finetune", "finetune/demo_scratch", "model.share=2")
TAUGHT = ("distill", "distill/demo", "teacher.source={teacher}")
STORED = (*TAUGHT, "store.folder={store}")
ROWS = {
    "labels": LABELS,
    "scores": (*TAUGHT, "distillation.attention=0", "distillation.hidden=0"),
    "relations": TAUGHT,
    "relations_from_teacher": (*TAUGHT, "run.init={shared}"),
    "labels_from_teacher": (*LABELS, "run.init={shared}"),
    "stored_all": STORED,
    "stored_half": (*STORED, "store.images={half}", "store.repeat=true"),
    "stored_fifth": (*STORED, "store.images={fifth}", "store.repeat=true"),
    "stored_tenth": (*STORED, "store.images={tenth}", "store.repeat=true"),
    "with_mae": (*TAUGHT, *MAE),
    "with_simmim": (*TAUGHT, *SIMMIM),
}


def main() -> None:
    """Measure, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="of every student (default %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="which of them (default %(default)s)")
    arguments = parser.parse_args()
    record = Record(arguments.out, arguments, table)
    for job in prepared(arguments):
        record.do(job)
    for seed in range(arguments.seeds):
        for row in arguments.rows.split(","):
            if row.startswith("stored"):
                record.do(store(arguments, seed))
            record.do(student(arguments, row, seed))
    for found in table(record):
        print(f"{found['row']:<24} {found['mean']:.1f} ± {found['deviation']:.1f}  {found['top1']}")


def prepared(arguments: argparse.Namespace) -> list[Job]:
    """What all students have in common: a teacher, and its weights for blocks that share theirs."""
    folder, unlabelled = arguments.folder, (f"data.train={arguments.train}", "data.val=null")
    pretrained, taught, shared = folder / "pretrained", folder / TEACHER, folder / SHARED
    begun = ("pretrain", "pretrain/demo", *unlabelled, *QUIET, f"run.folder={pretrained}")
    tuned = ("finetune", "finetune/demo", f"run.init={pretrained}", *labelled(arguments), *QUIET, AT_END)
    return [
        Job("pretrained", begun, pretrained),
        Job(TEACHER, (*tuned, f"run.folder={taught}"), taught),
        Job(SHARED, ("multiplex", str(taught), str(shared), "--share", "2", "--choose", "first"), shared),
    ]


def labelled(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The labelled images."""
    data = (f"data.train={arguments.train}", f"data.val={arguments.val}")
    return (*data, f"data.label={arguments.label}", f"data.classes={arguments.classes}")


def options(arguments: argparse.Namespace, row: str, seed: int) -> tuple[str, ...]:
    """A row's command up to its folder, with the paths of this seed filled in."""
    folder, epochs = arguments.folder, arguments.epochs
    paths = {"teacher": folder / TEACHER, "shared": folder / SHARED, "store": folder / f"store-{seed}"}
    parts = {name: f"{epochs // part}ep" for name, part in (("half", 2), ("fifth", 5), ("tenth", 10))}
    filled = tuple(option.format(**paths, **parts) for option in ROWS[row])
    return (*filled, *labelled(arguments), f"run.seed={seed}", f"run.images={epochs}ep", *QUIET, AT_END)


def student(arguments: argparse.Namespace, row: str, seed: int) -> Job:
    """A row's training."""
    folder = Path(arguments.folder) / f"{row}-{seed}"
    return Job(folder.name, (*options(arguments, row, seed), f"run.folder={folder}"), folder)


def store(arguments: argparse.Namespace, seed: int) -> Job:
    """The teacher's answers to every view of a run; a shorter store is the beginning of it."""
    folder = Path(arguments.folder) / f"store-{seed}"
    return Job(folder.name, ("teach", *options(arguments, "stored_all", seed)[1:]), folder)


def table(record: Record) -> list[Row]:
    """Rows that have finished."""
    seeds = range(int(record.protocol["seeds"]))
    found = {row: record.figures([f"{row}-{seed}" for seed in seeds]) for row in ROWS}
    return [{"row": row} | figures for row, figures in found.items() if figures]


if __name__ == "__main__":
    main()
