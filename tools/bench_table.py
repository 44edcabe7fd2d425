"""``halfseen bench table``: MAE on this machine's GPUs, each engine at its fastest micro-batch, beside other libraries.

Every trial has processes of its own, so that one which runs out of memory, or fails, costs itself alone.
"""

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfseen import receipt
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.monitor import peak_tflops
from halfseen.pretrain import objectives, targets
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load

from . import bench_step
from .bench_engine import PLAIN, Crew, Job, alone, listed, settings

RECIPES = ["pretrain/mae_b16", "pretrain/mae_l16"]
ENGINES = (
    "single,ddp,ddp:compile=true,fsdp,fsdp:compile=true,deepspeed:zero_stage=1,deepspeed:zero_stage=2,"
    "deepspeed:zero_stage=3,fairscale,fairscale:fairscale=sharded"
)
GAIN = 1.02  # a doubled micro-batch that is not this much faster is the last one tried


@dataclass
class Trial:
    """One engine at one micro-batch."""

    batch: int  # images per rank
    images_per_second: float  # of all ranks
    memory: int  # peak bytes of the largest rank


@dataclass
class Row:
    """One engine or library: what was tried, and why there is no more."""

    name: str
    ranks: int
    trials: list[Trial] = field(default_factory=list)
    failure: str = ""

    @property
    def best(self) -> Trial | None:
        """The fastest trial."""
        return max(self.trials, key=lambda trial: trial.images_per_second, default=None)


def main(argv: Sequence[str]) -> int:
    """``halfseen bench table [RECIPE...] [key=value ...] [options]``; returns the exit code."""
    arguments = parse(argv)
    overrides = [item for item in arguments.items if "=" in item]
    recipes = [item for item in arguments.items if "=" not in item] or RECIPES
    results = []
    for recipe in recipes:
        settings(recipe, overrides, PLAIN)  # refuses before anything is started
        rows = []
        for name, ranks, make in candidates(arguments):
            print(f"{recipe}: {name} on {ranks} ...", flush=True)
            rows.append(measured(name, ranks, make, recipe, overrides, arguments))
        results.append(report(recipe, overrides, rows, arguments))
        print(table(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""

    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(prog="halfseen bench table", description=__doc__)
    parser.add_argument("items", nargs="*", metavar="RECIPE | key=value", help=f"what to train ({' '.join(RECIPES)})")
    parser.add_argument("--engines", type=listed, default=ENGINES, help="NAME:option=value:...,NAME (%(default)s)")
    parser.add_argument("--against", type=listed, default=list(bench_step.PEERS), help="other libraries, on one rank")
    parser.add_argument("--ranks", type=int, default=max(gpus, 1), help="processes, one a GPU (all GPUs)")
    parser.add_argument("--start", type=int, default=64, help="micro-batch to begin with (64)")
    parser.add_argument("--most", type=int, default=4096, help="largest micro-batch to try (4096)")
    parser.add_argument("--steps", type=int, default=10, help="steps in one turn (10)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each trial (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank on the CPU (1)")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every recipe")
    arguments = parser.parse_intermixed_args(list(argv))
    for name in arguments.against:
        if name not in bench_step.PEERS:
            parser.error(f"--against: {name!r} is not one of {', '.join(bench_step.PEERS)}")
    return arguments


def candidates(arguments: argparse.Namespace) -> list[tuple[str, int, Callable[..., Job] | None]]:
    """Names, numbers of ranks and jobs of all rows."""
    engines = [name for name in arguments.engines if arguments.ranks == 1 or not alone(name)]
    peers = [(name, 1, functools.partial(Peer, name)) for name in arguments.against]
    return [*((name, arguments.ranks, None) for name in engines), *peers]


# --------------------------------------------------------------------------------------------------- the trials


class Peer(Job):
    """Another library's step in place of an engine's."""

    def __init__(
        self, name: str, config: Pretrain, world: World, plain: bool, arguments: argparse.Namespace, folder: Path
    ) -> None:
        if config.engine.precision not in bench_step.DTYPES:
            fix = f"use one of {', '.join(bench_step.DTYPES)}"
            raise ConfigError("engine.precision", config.engine.precision, "peers are not run in it", fix)
        self.world, self.count, self.folder = world, arguments.steps, folder
        self.one = bench_step.create(name, config, arguments.batch, config.engine.precision, world.device).step


def measured(
    name: str,
    ranks: int,
    make: Callable[..., Job] | None,
    recipe: str,
    overrides: list[str],
    arguments: argparse.Namespace,
) -> Row:
    """All trials of one row; what fails is said in the row and spares the others."""
    row = Row(name, ranks)

    def trial(batch: int) -> Trial:
        order = argparse.Namespace(**vars(arguments) | {"batch": batch})
        crew = Crew(PLAIN if make else name, ranks, make=make)
        # The folder is for checkpoints, of which none is written.
        with crew.started(recipe, overrides, order, Path(tempfile.gettempdir())):
            for _ in range(arguments.repeats):
                crew.turn()
        found = Trial(batch, batch * ranks / statistics.median(crew.seconds), crew.memory)
        print(f"  micro-batch {batch}: {found.images_per_second:,.0f} img/s", flush=True)
        return found

    try:
        if not make:
            settings(recipe, overrides, name)
        climb(trial, arguments.start, arguments.most, row.trials)
    except (ConfigError, RuntimeError) as error:
        row.failure = str(error).strip().splitlines()[0 if isinstance(error, ConfigError) else -1]
        print(f"  failed: {error}", flush=True)
    if not row.trials and not row.failure:
        row.failure = "out of memory"
    return row


def climb(trial: Callable[[int], Trial], start: int, most: int, found: list[Trial]) -> None:
    """Try micro-batches twice as large each time, while they fit and are faster; results are added to ``found``.

    trial(batch) raises MemoryError for what does not fit. Half-way from the last that fits is tried too; where not
    even the first fits, smaller ones are.
    """
    batch = start
    while 1 <= batch <= most:
        try:
            found.append(trial(batch))
        except MemoryError:
            if found:
                break
            batch = most = batch // 2
            continue
        if len(found) > 1 and found[-1].images_per_second < GAIN * found[-2].images_per_second:
            return
        batch *= 2
    between = found[-1].batch * 3 // 2 if found else most + 1
    if found[-1:] and found[-1].batch < between <= most:
        try:
            found.append(trial(between))
        except MemoryError:
            return


# --------------------------------------------------------------------------------------------------- the report


def report(recipe: str, overrides: list[str], rows: list[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, and where: what --json writes."""
    config = load(Pretrain, recipe, overrides)
    with torch.device("meta"):
        student: Any = objectives.create(config, targets.create(config, torch.device("meta")))
    flops = student.train_flops_per_image()
    gpu = bench_step.device_of(config.engine.device) == "cuda"
    peak = config.monitor.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if gpu else None)
    listed = []
    for row in rows:
        entry: dict[str, Any] = {"name": row.name, "ranks": row.ranks, "failure": row.failure}
        if best := row.best:
            speed = best.images_per_second / row.ranks
            ours = row.name not in bench_step.PEERS  # peers multiply more for the same images
            entry |= {"best": asdict(best), "images_per_second_per_rank": speed}
            entry["mfu"] = speed * flops / (peak * 1e12) if peak and ours else None
        listed.append(entry | {"trials": [asdict(trial) for trial in row.trials]})
    return {
        "recipe": recipe,
        "overrides": overrides,
        "precision": config.engine.precision,
        "train_flops_per_image": flops,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "peak_tflops": peak,
        "steps_per_turn": arguments.steps,
        "repeats": arguments.repeats,
        "rows": listed,
        "device": torch.cuda.get_device_name() if gpu else receipt.processor(),
        "versions": receipt.versions() | {name: receipt.installed(name) for name in arguments.against},
        "source": receipt.source(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a table for a page."""
    lines = [
        "",
        f"`{' '.join([result['recipe'], *result['overrides']])}`: {result['device']}, {result['precision']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['train_flops_per_image'] / 1e9:.1f} GFLOP an image",
        "",
        "| engine | ranks | best micro-batch | img/s | img/s a rank | MFU | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        best = row.get("best")
        if best:
            mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
            figures = f"{best['batch']} | {best['images_per_second']:,.0f} | {row['images_per_second_per_rank']:,.0f}"
            text = f"{figures} | {mfu} | {best['memory'] / 2**30:.1f}"
        else:
            text = f"{row['failure']} | | | |"
        lines.append(f"| `{row['name']}` | {row['ranks']} | {text} |")
    return "\n".join(lines)
