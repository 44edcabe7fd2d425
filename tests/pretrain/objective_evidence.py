"""Measures what each objective is worth: fine-tuned accuracy after equally many images, for both stems and some seeds.

python tests/pretrain/objective_evidence.py FOLDER --train SHARDS --val SHARDS --classes K --out FILE.json

Every run is an ordinary ``halfseen pretrain`` or ``halfseen finetune``; its command is in the file. Run it again to
continue: what has finished is not repeated.
"""

import argparse
import itertools
from pathlib import Path

from evidence import AT_END, QUIET, Job, Record, Row, parser_of

STEMS = ("patch", "hmlp")
SCRATCH = "scratch"
PRECISION = "engine.precision=bf16"

# Beside pretrain/demo. Proportions of the published recipes on a grid of 6 x 6 patches; NAME: the folder of that run.
BLOCK = ("mask.kind=block", "mask.count=14", "mask.min_block=4")
FEATURES = ("target.name=features", "target.features.loss=cosine", "target.features.teacher.source=mae")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "mae": (),
    "simmim": (
        *("objective.name=mim", "target.normalise=false", "target.error=absolute"),
        *("mask.kind=coarse", "mask.cell=16", "mask.ratio=0.6"),
    ),
    "features": ("objective.name=mim", *BLOCK, *FEATURES),
    "vqkd": (
        *("objective.name=vqkd", "mask.kind=none", *FEATURES, "objective.vqkd.decoder_width=96"),
        *("objective.vqkd.decoder_depth=1", "objective.vqkd.decoder_heads=3"),
        *("objective.vqkd.quantizer.codes=256", "objective.vqkd.quantizer.width=16"),
        # So few steps need a codebook that follows sooner: with the published 0.99 and 0, two codes were left.
        *("objective.vqkd.quantizer.decay=0.9", "objective.vqkd.quantizer.revive=64"),
    ),
    "beit2": (
        *("objective.name=beit2", "objective.beit2.early=4", "objective.beit2.extra=1", *BLOCK),
        *("target.name=codes", "target.codes.tokenizer=vqkd"),
    ),
}
LINKS = ("target.features.teacher.source", "target.codes.tokenizer")  # options whose value is another run's name
ROWS = (*(name for name in OBJECTIVES if name != "vqkd"), SCRATCH)


class Evidence:
    """The plan, and what is known so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.record = arguments, Record(arguments.out, arguments, table)

    def measure(self) -> None:
        """All runs; those that need a tokenizer last."""
        cells = [(stem, seed) for seed in range(self.arguments.seeds) for stem in STEMS]
        for pretrained, rows in ((("mae", "simmim", "features"), (SCRATCH,)), (("vqkd", "beit2"), ())):
            for (stem, seed), objective in itertools.product(cells, pretrained):
                if objective != "vqkd" or seed == 0:
                    self.record.do(self.pretraining(objective, stem, seed))
            for (stem, seed), row in itertools.product(cells, (*pretrained, *rows)):
                if row in ROWS:
                    self.record.do(self.finetuning(row, stem, seed))

    def pretraining(self, objective: str, stem: str, seed: int) -> Job:
        """An objective's pretraining. A tokenizer's is half as long, and the first seed's serves all."""
        images = self.arguments.pretrain_images // (2 if objective == "vqkd" else 1)
        shared = ("optim.lr=1e-3", "run.global_batch=64", f"run.images={images}", "data.label=none", "data.val=null")
        own = tuple(self.linked(option, stem, seed) for option in OBJECTIVES[objective])
        return self.job("pretrain", f"{objective}-{stem}-{seed}", stem, seed, (*shared, *own))

    def linked(self, option: str, stem: str, seed: int) -> str:
        """An option with the name of another run replaced by its folder."""
        key, _, value = option.partition("=")
        seed = 0 if value == "vqkd" else seed
        return f"{key}={self.folder(f'{value}-{stem}-{seed}')}" if key in LINKS else option

    def finetuning(self, row: str, stem: str, seed: int) -> Job:
        """A row's fine-tuning, by the demo's recipe for pretrained weights or for random ones."""
        options: tuple[str, ...] = (
            *(f"run.images={self.arguments.finetune_images}", AT_END),
            *(f"data.label={self.arguments.label}", f"data.classes={self.arguments.classes}"),
            f"data.val={self.arguments.val}",
        )
        start = f"run.init={self.folder(f'{row}-{stem}-{seed}')}"
        recipe = "demo_scratch" if row == SCRATCH else "demo"
        options += () if row == SCRATCH else (start,)
        return self.job("finetune", finetuned(row, stem, seed), stem, seed, options, recipe)

    def job(self, stage: str, name: str, stem: str, seed: int, options: tuple[str, ...], recipe: str = "demo") -> Job:
        """A run with what all have in common."""
        shared = (f"model.stem={stem}", f"run.seed={seed}", f"data.train={self.arguments.train}")
        folder = self.folder(name)
        return Job(
            name, (stage, f"{stage}/{recipe}", *shared, *options, *QUIET, PRECISION, f"run.folder={folder}"), folder
        )

    def folder(self, name: str) -> Path:
        """Where a run lies."""
        return Path(self.arguments.folder) / name


def table(record: Record) -> list[Row]:
    """Rows that have finished."""
    rows = []
    for row, stem in itertools.product(ROWS, STEMS):
        names = [finetuned(row, stem, seed) for seed in range(int(record.protocol["seeds"]))]
        if figures := record.figures(names):
            rows.append({"row": row, "stem": stem} | figures)
    return rows


def finetuned(row: str, stem: str, seed: int) -> str:
    """Name of a fine-tuning."""
    return f"{row}-{stem}-{seed}-finetuned"


def main() -> None:
    """Measure, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--pretrain-images", type=int, default=24_000, help="each pretraining (default %(default)s)")
    parser.add_argument("--finetune-images", type=int, default=9_600, help="each fine-tuning (default %(default)s)")
    evidence = Evidence(parser.parse_args())
    evidence.measure()
    print(markdown(table(evidence.record)))


def markdown(rows: list[Row]) -> str:
    """The table for people: objectives down, stems across, per cent."""
    cells = {(row["row"], row["stem"]): f"{row['mean']:.1f} ± {row['deviation']:.1f}" for row in rows}
    lines = ["| | " + " | ".join(f"`{stem}`, top-1 in %" for stem in STEMS) + " |", "| --- " * 3 + "|"]
    lines += [f"| `{row}` | " + " | ".join(cells.get((row, stem), "") for stem in STEMS) + " |" for row in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
