"""``halfseen bench distill RECIPE key=value ...``: what a teacher costs, what a store and what shared weights save.

Times one process on random images and a teacher as the recipe names it (teacher.weights=random will do). Bytes are
computed from the shapes, not measured: of AdamW's two moments, and of what a rank receives and sends in one step when
weights are sharded -- gathered in the forward, gathered again in the backward, gradients reduced: three times the
weights, a shared group once and not once for each use.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from halfseen import distributed, engines, optim
from halfseen.config import ConfigError
from halfseen.data.writer import ShardWriter
from halfseen.distributed import World
from halfseen.models.sizes import resolve
from halfseen.pretrain import store
from halfseen.pretrain.distill import store as answers
from halfseen.pretrain.distill import teacher, train
from halfseen.pretrain.distill.config import Distill
from halfseen.pretrain.distill.masking import Masks
from halfseen.pretrain.distill.student import Distilled
from halfseen.recipes import load


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="halfseen bench distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a distillation recipe")
    parser.add_argument("overrides", nargs="*", help="options, e.g. teacher.weights=random teacher.classes=1000")
    parser.add_argument("--batch", type=int, default=8, help="images per step (8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind, interleaved (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (1)")
    parser.add_argument(
        "--share", default="1,2,3", help="blocks in a group, of a ViT: those that divide its depth (1,2,3)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_intermixed_args(list(argv))
    config = load(Distill, arguments.recipe, arguments.overrides)
    torch.set_num_threads(arguments.threads)
    with distributed.started(config.engine.device) as world:
        if world.world > 1:
            raise ConfigError("WORLD_SIZE", world.world, "one process is measured", "start it without torchrun")
        shares = [int(part) for part in arguments.share.split(",")]
        result = measure(config, world, arguments.batch, arguments.repeats, shares)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(config: Distill, world: World, batch: int, repeats: int, shares: Sequence[int]) -> dict[str, Any]:
    """All figures. Seconds are of one step; jobs take turns, and the median counts."""
    live = train.live_teacher(config, world)
    side = config.data.image_size
    image = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(world.device)
    target = torch.zeros(batch, config.data.classes, device=world.device)
    target[:, 0] = 1.0
    position, keys = torch.arange(batch), [str(number) for number in range(batch)]
    answer = live(image)
    with TemporaryDirectory() as folder:
        size, stored = keep(Path(folder), config, answer, keys, world)
        jobs: dict[str, Callable[[], Any]] = {
            "teacher": lambda: live(image),
            "store": lambda: stored(position, keys),
        }
        figures: dict[str, dict[str, Any]] = {}
        depth = resolve(config.model).depth
        for share in [share for share in shares if depth % share == 0] if config.trunk == "vit" else [0]:
            name, chosen = (f"student s={share}", sharing(config, share)) if share else ("student", config)
            student, ask = train.create_student(chosen, live, live(image[:1]), replace(world, rank=1))  # says nothing
            ready = {"image": image, "target": target} | ask(image, position, keys)
            if student.hidden_patches is not None:
                ready = Masks(chosen, student.hidden_patches.target)(ready, {"position": position})
            engine = engine_of(chosen, student, world)
            norms = engine.norms(ready, student.terms)
            figures[name] = sizes(student) | {
                "gradients": {term.removeprefix("loss_"): float(norm) for term, norm in norms.items()}
            }
            jobs[name] = partial(engine.step, [ready], 1e-4, 0)
        seconds = timed(jobs, repeats, world)
    return {
        "batch": batch,
        "image_size": side,
        "teacher": config.teacher.source,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "stored_bytes_per_image": size,
        "students": figures,
    }


def keep(
    folder: Path, config: Distill, answer: teacher.Answer, keys: Sequence[str], world: World
) -> tuple[float, answers.Stored]:
    """A store of one block with the answer to the batch; bytes per image, and its reader."""
    with ShardWriter(folder / store.shard_name(0)) as writer:
        store.write_block(writer, 0, keys, answers.packed(answer, config.store, len(keys)), {})
    size = (folder / store.shard_name(0)).stat().st_size / len(keys)
    return size, answers.Stored(folder, len(keys), len(keys), config.data.classes, world.device)


def sharing(config: Distill, share: int) -> Distill:
    """The same run with another group size."""
    return replace(config, model=replace(config.model, share=share, groups=[]))


def sizes(student: Distilled) -> dict[str, float]:
    """Parameters, and bytes that follow from them."""
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    blocks = sum(parameter.numel() for block in student.blocks() for parameter in block.parameters())
    return {
        "parameters": trained,
        "block_parameters": blocks,
        "moments_bytes": 8 * trained,
        "sharded_bytes": 12 * trained,
    }


def engine_of(config: Distill, student: Distilled, world: World) -> engines.Engine:
    """The student in the engine that the config names."""
    return engines.create(config.engine, student, config.optim, optim.groups(student, config.optim), world, 0)


def timed(jobs: dict[str, Callable[[], Any]], repeats: int, world: World) -> dict[str, float]:
    """Median seconds of each job after one untimed call; they take turns, so that a slow moment meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def table(result: dict[str, Any]) -> str:
    """The figures, for people."""
    seconds, batch = result["seconds"], result["batch"]
    lines = [
        f"batch {batch}; teacher {1e3 * seconds['teacher']:.1f} ms, reading its answers from a store "
        f"{1e3 * seconds['store']:.1f} ms, {result['stored_bytes_per_image']:,.0f} bytes per image",
        f"{'':<14}{'parameters':>12}{'moments':>10}{'sharded':>10}{'step':>9}{'teacher':>9}{'live':>10}{'stored':>10}",
    ]
    for name, found in result["students"].items():
        step = seconds[name]
        live, stored = step + seconds["teacher"], step + seconds["store"]
        lines.append(
            f"{name:<14}{found['parameters']:>12,}{found['moments_bytes'] / 2**20:>6.1f} MiB"
            f"{found['sharded_bytes'] / 2**20:>6.1f} MiB{1e3 * step:>6.0f} ms{seconds['teacher'] / live:>9.0%}"
            f"{batch / live:>6.1f} im/s{batch / stored:>6.1f} im/s"
        )
    for name, found in result["students"].items():
        norms = found["gradients"]
        shares = ", ".join(f"{term} {norm:.3g} ({norm / sum(norms.values()):.0%})" for term, norm in norms.items())
        lines.append(f"{name}: gradient norm of each weighted term: {shares}")
    return "\n".join(lines)
