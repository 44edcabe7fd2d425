"""``halfseen bench finetune``: full against partial fine-tuning of one student: time, memory and bytes on disk."""

import argparse
import gc
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from halfseen import delta, engines, optim, receipt
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.finetune.config import Finetune
from halfseen.finetune.train import create_student
from halfseen.recipes import load

from .bench_step import Job, device_of, measure, paired, spread

# What is compared: name -> options. The first one is what the others are measured against.
JOBS = {
    "full": ["task.train=all"],
    "attention": ["task.train=attention"],
    "attention, recompute": ["task.train=attention", "task.recompute_mlp=true"],
}
# What must be reached: job -> (figure, least value): how many times faster, and which share of saved bytes is gone.
BARS = {"attention": (("ratio", 1.18), ("saved", 0.31)), "attention, recompute": (("ratio", 1.0), ("saved", 0.50))}
DELTA_BAR = 0.36  # most bytes of a ViT-B's attention-only delta over those of the whole file
DEFAULTS = ["model.size=s", "model.drop_path=0", "data.image_size=384", "data.classes=1000", "engine.name=single"]


def main(argv: Sequence[str]) -> int:
    """``halfseen bench finetune [RECIPE] [key=value ...] [options]``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen bench finetune", description=__doc__)
    parser.add_argument("items", nargs="*", metavar="RECIPE | key=value", help="the student (default: ViT-S at 384)")
    parser.add_argument("--batch", type=int, default=4, help="images per step (4)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each, interleaved (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (1)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_intermixed_args(list(argv))
    result = run(arguments)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def options(items: Sequence[str], job: str) -> tuple[str | None, list[str]]:
    """Recipe and overrides of one job."""
    recipe = items[0] if items and "=" not in items[0] else None
    given = list(items[1:] if recipe else items)
    return recipe, [*([] if recipe else DEFAULTS), "data.classes=1000", *given, *JOBS[job]]


def prepared(items: Sequence[str], job: str, batch: int) -> tuple[Finetune, Engine, dict[str, Tensor]]:
    """A job's config, its engine over random weights, and one batch of random images on the device."""
    recipe, overrides = options(items, job)
    config = load(Finetune, recipe, overrides)
    device = torch.device(device_of(config.engine.device))
    torch.manual_seed(0)
    student = create_student(config)
    groups = optim.groups(student, config.optim, student.layer_of, student.layers())
    engine = engines.create(config.engine, student, config.optim, groups, World(device=device), 0)
    side, classes = config.data.image_size, config.data.classes
    image = torch.randn(batch, 3, side, side, device=device)
    target = torch.rand(batch, classes, device=device).softmax(1)
    return config, engine, {"image": image, "target": target}


# ------------------------------------------------------------------------------------------------ measurement


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything measured."""
    torch.set_num_threads(arguments.threads)
    peaks = {name: peak_alone(arguments, name) for name in JOBS}
    rows: list[dict[str, Any]] = []
    jobs: list[Job] = []
    for name in JOBS:
        config, engine, batch = prepared(arguments.items, name, arguments.batch)
        rows.append({"name": name, **counted(engine, batch), "peak_bytes": peaks[name]})
        jobs.append(Job(name, config.engine.precision, stepping(engine, batch)))
        device, model = engine.world.device, config.model
    measure(jobs, device, arguments.repeats)
    clock = "seconds" if device.type == "cuda" or arguments.threads > 1 else "cpu_seconds"
    for row, job in zip(rows, jobs):
        row |= {"seconds": spread(getattr(job, clock)), "all_seconds": getattr(job, clock)}
        row["ratio"] = paired(getattr(jobs[0], clock), getattr(job, clock))
        row["saved"] = 1 - row["saved_bytes"] / rows[0]["saved_bytes"]
    return {
        "clock": clock,
        "precision": config.engine.precision,
        "image_size": config.data.image_size,
        "model": {name: value for name, value in vars(model).items() if value is not None},
        "batch": arguments.batch,
        "threads": arguments.threads,
        "jobs": rows,
        "bars": bars(rows),
        "delta": {"vit_b_share": delta_share(), "most": DELTA_BAR},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else receipt.processor(),
        "versions": receipt.versions(),
        "source": receipt.source(),
    }


def stepping(engine: Engine, batch: dict[str, Tensor]) -> Any:
    """The engine's whole step: forward, backward, norm of the gradient, finite check, update."""
    return lambda: engine.step([batch], 1e-5, 0)["loss"]


def counted(engine: Engine, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes kept for the backward, of the optimizer, of a checkpoint; numbers that train."""
    state = engine.state()
    total = {key: value.numel() * value.element_size() for key, value in state.items()}
    return {
        "trained": sum(parameter.numel() for parameter in engine.trained.values()),
        "saved_bytes": saved_bytes(engine, batch),
        "optimizer_bytes": sum(size for key, size in total.items() if key.startswith("optim.")),
        "checkpoint_bytes": sum(total.values()),
    }


def saved_bytes(engine: Engine, batch: dict[str, Tensor]) -> int:
    """Bytes of distinct memory that a forward keeps for its backward; weights and the batch do not count."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in (*engine.student.parameters(), *batch.values())}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the count is over, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        scalars = engine.forward(batch)
    del scalars
    return sum(seen.values())


def peak_alone(arguments: argparse.Namespace, name: str) -> int:
    """Most memory of a process of its own that takes two steps of one job."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (arguments.items, name, arguments.batch, arguments.threads))


def peak(items: Sequence[str], name: str, batch: int, threads: int) -> int:
    """Peak bytes of two steps: of this process on the CPU, allocated on a GPU."""
    torch.set_num_threads(threads)
    _, engine, images = prepared(items, name, batch)
    for _ in range(2):
        engine.step([images], 1e-5, 0)
    if engine.world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def delta_share() -> float:
    """Bytes of the delta file of an attention-only ViT-B at 384 over those of its whole file, both written here."""
    config = load(
        Finetune,
        None,
        ["model.size=b", "data.image_size=384", "data.classes=1000", "task.train=attention", "task.pool=class"],
    )
    student = create_student(config)
    base = {name: value.clone() for name, value in student.state_dict().items()}
    nudge(student)
    tensors, header = delta.make(base, student.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / "delta.safetensors", Path(folder) / "whole.safetensors"
        delta.write(path, tensors, header)
        delta.save_file(base, whole)
        share = path.stat().st_size / whole.stat().st_size
    gc.collect()
    return share


@torch.no_grad()
def nudge(student: nn.Module) -> None:
    """Change every number that trains, as a step would."""
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(1e-3)


# ------------------------------------------------------------------------------------------------ the report


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar, and whether it is met."""
    found = []
    for row in rows:
        for figure, least in BARS.get(row["name"], ()):
            value = row["ratio"]["median"] if figure == "ratio" else row["saved"]
            found.append({"job": row["name"], "figure": figure, "value": value, "least": least, "met": value >= least})
    return found


COLUMNS = (
    *(("", 22), ("seconds", 9), ("faster", 8), ("kept, MB", 10), ("less", 7)),
    *(("peak, MB", 10), ("optimizer", 11), ("checkpoint", 12)),
)


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    clock = {"seconds": "wall seconds", "cpu_seconds": "processor seconds"}[result["clock"]]
    lines = [
        f"{result['device']}, {result['threads']} threads, batch {result['batch']}, {result['image_size']} px, "
        f"{result['precision']}; one step in {clock}: forward, backward, AdamW",
        "".join(f"{title:>{width}}" for title, width in COLUMNS),
    ]
    for row in result["jobs"]:
        lines.append(
            f"{row['name']:<22}{row['seconds']['median']:>9.3f}{row['ratio']['median']:>7.2f}x"
            f"{row['saved_bytes'] / 1e6:>10.1f}{row['saved']:>7.1%}{row['peak_bytes'] / 1e6:>10.0f}"
            f"{row['optimizer_bytes'] / 1e6:>11.1f}{row['checkpoint_bytes'] / 1e6:>12.1f}"
        )
    for bar in result["bars"]:
        what = "times faster" if bar["figure"] == "ratio" else "fewer saved bytes"
        verdict = "met" if bar["met"] else "NOT MET"
        lines.append(f"bar {verdict}: {bar['job']}, {what} {bar['value']:.3f}, needed {bar['least']}")
    share, most = result["delta"]["vit_b_share"], result["delta"]["most"]
    verdict = "met" if share <= most else "NOT MET"
    lines.append(f"bar {verdict}: a ViT-B's attention delta is {share:.1%} of the whole file, at most {most:.0%}")
    return "\n".join(lines)
