"""Measures what each objective is worth: fine-tuned accuracy after equally many images, for both stems and some seeds.

python tests/pretrain/objective_evidence.py FOLDER --train SHARDS --val SHARDS --classes K --out FILE.json

Every run is an ordinary ``halfseen pretrain`` or ``halfseen finetune``; its command is in the file. All run one after
the other in this process. Run it again to continue: what has finished is not repeated.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfseen import receipt
from halfseen.finetune.train import main as finetune
from halfseen.pretrain.train import main as pretrain

STEMS = ("patch", "hmlp")
STAGES = {"pretrain": pretrain, "finetune": finetune}
SCRATCH = "scratch"
QUIET = ("run.checkpoint_every=100%", "run.picture_every=0", "monitor.tensorboard=false", "engine.precision=bf16")

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


@dataclass(frozen=True)
class Job:
    """One run of a stage."""

    stage: str
    name: str  # its folder
    options: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["halfseen", self.stage, *self.options])


class Evidence:
    """The plan, and what is known so far; kept in the file after every run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.path = arguments, arguments.out
        self.runs: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.runs = json.loads(self.path.read_text())["runs"]

    def measure(self) -> None:
        """All runs; those that need a tokenizer last."""
        cells = [(stem, seed) for seed in range(self.arguments.seeds) for stem in STEMS]
        for pretrained, rows in ((("mae", "simmim", "features"), (SCRATCH,)), (("vqkd", "beit2"), ())):
            for (stem, seed), objective in itertools.product(cells, pretrained):
                if objective != "vqkd" or seed == 0:
                    self.do(self.pretraining(objective, stem, seed))
            for (stem, seed), row in itertools.product(cells, (*pretrained, *rows)):
                if row in ROWS:
                    self.do(self.finetuning(row, stem, seed))

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
            *(f"run.images={self.arguments.finetune_images}", "run.evaluate_every=100%"),
            *(f"data.label={self.arguments.label}", f"data.classes={self.arguments.classes}"),
            f"data.val={self.arguments.val}",
        )
        start = f"run.init={self.folder(f'{row}-{stem}-{seed}')}"
        recipe = "demo_scratch" if row == SCRATCH else "demo"
        options += () if row == SCRATCH else (start,)
        return self.job("finetune", finetuned(row, stem, seed), stem, seed, options, recipe)

    def job(self, stage: str, name: str, stem: str, seed: int, options: tuple[str, ...], recipe: str = "demo") -> Job:
        """A run with what all have in common."""
        shared = (f"model.stem={stem}", f"run.seed={seed}", f"data.train={self.arguments.train}", "data.workers=0")
        return Job(stage, name, (f"{stage}/{recipe}", *shared, *options, *QUIET, f"run.folder={self.folder(name)}"))

    def folder(self, name: str) -> Path:
        """Where a run lies."""
        return Path(self.arguments.folder) / name

    def do(self, job: Job) -> None:
        """Run a job unless it has finished, and write down what came out."""
        if self.runs.get(job.name, {}).get("command") == job.command:
            return
        print(f"$ {job.command}", flush=True)
        wall, processor = time.monotonic(), time.process_time()
        if code := STAGES[job.stage](job.options):
            raise SystemExit(code)
        found: dict[str, Any] = {"command": job.command, "cpu_seconds": round(time.process_time() - processor, 1)}
        found["seconds"] = round(time.monotonic() - wall, 1)
        self.runs[job.name] = found | outcome(job.stage, self.folder(job.name))
        self.write()

    def write(self) -> None:
        """The file, whole at every moment."""
        content = {
            "protocol": {name: str(value) for name, value in vars(self.arguments).items() if name != "out"},
            "table": self.table(),
            "runs": self.runs,
            "device": receipt.processor(),
            "versions": receipt.versions(),
            "source": receipt.source(),
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)

    def table(self) -> list[dict[str, Any]]:
        """Rows that have finished: per cent top-1 of each seed, their mean and sample deviation."""
        rows = []
        for row, stem in itertools.product(ROWS, STEMS):
            found = [self.runs.get(finetuned(row, stem, seed)) for seed in range(self.arguments.seeds)]
            values = [round(100 * run["top1"], 2) for run in found if run]
            if len(values) == self.arguments.seeds:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                figures = {"top1": values, "mean": round(statistics.fmean(values), 2), "deviation": round(spread, 2)}
                rows.append({"row": row, "stem": stem} | figures)
        return rows


def finetuned(row: str, stem: str, seed: int) -> str:
    """Name of a fine-tuning."""
    return f"{row}-{stem}-{seed}-finetuned"


def outcome(stage: str, folder: Path) -> dict[str, Any]:
    """Last figures of a finished run: accuracy of a classifier, the last logged scalars of a pretraining."""
    if stage == "finetune":
        last = json.loads((folder / "evaluation.json").read_text())["last"]
        return {"top1": last["val/top1"], "images_evaluated": last["images"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"last": next(line for line in reversed(lines) if "loss" in line)}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="for the runs")
    parser.add_argument("--train", default="embedded:emoji/train", help="labelled shards (default %(default)s)")
    parser.add_argument("--val", default="embedded:emoji/val", help="shards to evaluate on (default %(default)s)")
    parser.add_argument("--label", default="folder", help="where a label is, as data.label (default %(default)s)")
    parser.add_argument("--classes", type=int, default=12, help="of the labels (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-images", type=int, default=24_000, help="each pretraining (default %(default)s)")
    parser.add_argument("--finetune-images", type=int, default=9_600, help="each fine-tuning (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON of everything measured")
    evidence = Evidence(parser.parse_args())
    evidence.measure()
    print(markdown(evidence.table()))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people: objectives down, stems across, per cent."""
    cells = {(row["row"], row["stem"]): f"{row['mean']:.1f} ± {row['deviation']:.1f}" for row in rows}
    lines = ["| | " + " | ".join(f"`{stem}`, top-1 in %" for stem in STEMS) + " |", "| --- " * 3 + "|"]
    lines += [f"| `{row}` | " + " | ".join(cells.get((row, stem), "") for stem in STEMS) + " |" for row in ROWS]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
