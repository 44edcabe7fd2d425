"""Capsules: enough to run a step again whose numbers were not finite, and to find the culprit."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfseen
from halfseen.checkpoint import Checkpoints
from halfseen.checkpoint.read import find_checkpoint
from halfseen.config import ConfigError
from halfseen.derived import Batches
from halfseen.engines import Engine
from halfseen.optim import Schedule
from halfseen.writing import write_whole

FORMAT = 1


class NotFinite(RuntimeError):
    """A run stopped because its numbers stayed infinite or NaN. The message names the capsule."""


def write(
    checkpoints: Checkpoints,
    newest: Path | None,
    engine: Engine,
    plan: Batches,
    position: int,
    skipped: int,
    finding: "Finding | None" = None,
) -> Path:
    """Write RUN/capsules/img_POSITION.json on rank 0; returns its path on every rank. Collective.

    Batches, masks and dropout are functions of (seed, position), so a checkpoint and a position say it all.
    newest: the checkpoint the step is reached from; None: the run's first weights. position: where the first
    skipped update began. finding: what this rank saw when it took that step again, if it did.
    """
    seen = checkpoints.world.gather_object(asdict(finding) if finding else None)
    run = checkpoints.folder.parent
    path = run / "capsules" / f"img_{position:012d}.json"
    if checkpoints.world.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "halfseen": halfseen.__version__,
            "torch": str(torch.__version__),
            "seed": engine.seed,
            "position": position,
            "step": position // plan.total,
            "global_batch": plan.total,
            "samples": [position, position + plan.total],  # first, and one after the last
            "world": plan.world,
            "micro_batch": plan.micro,
            "accumulation": plan.accumulation,
            "engine": engine.name,
            "precision": engine.cfg.precision,
            "skipped": skipped,
            "checkpoint": f"{checkpoints.folder.name}/{newest.name}" if newest else None,
            "config": "config.yaml",
            "seen": [part for part in seen if part],  # rank by rank, with the weights the run stopped with
        }
        write_whole(path, json.dumps(content, indent=1) + "\n")
    checkpoints.world.barrier()
    return path


def read(path: Path) -> dict[str, Any]:
    """A capsule's content; ConfigError if the file is not one."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        int(content["position"]), int(content["global_batch"]), int(content["seed"]), content["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("capsule", str(path), f"cannot be read: {error}", "name RUN/capsules/img_....json") from error
    return dict(content)


@dataclass(frozen=True)
class Finding:
    """What one rank saw when it took the step again."""

    position: int
    reproduced: bool  # the update was skipped again
    inputs: list[str]  # tensors of the batch that were not finite already
    module: str | None  # the first module whose output was not finite
    gradient: str | None  # the first module, coming from the loss, whose output's gradient was not finite
    operation: str | None  # autograd's message about the first operation whose gradient was NaN
    samples: dict[int, str]  # position -> key: those whose rows were not finite, or all where that is not known

    def __str__(self) -> str:
        if not self.reproduced:
            return f"the step at {self.position:,} is finite this time: suspect the device that ran it"
        if self.inputs:
            where = f"the batch brings {', '.join(self.inputs)}"
        elif self.module:
            where = f"first in the forward of {self.module}"
        elif self.gradient:
            where = f"in the backward, between the loss and the output of {self.gradient}"
        else:
            where = "in the gradient of a weight"
        return f"the step at {self.position:,} is not finite: {where}" + (
            f" ({self.operation})" if self.operation else ""
        )


def replay(
    path: Path,
    *,
    engine: Engine,
    batches: Callable[[int], Iterator[dict[str, Any]]],
    plan: Batches,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    schedule: Schedule,
    checkpoints: Checkpoints,
) -> Finding:
    """Run the capsule's step again, from its checkpoint, and say where the first wrong number arose.

    engine: freshly made from the run's config, best with engine.compile=false (compiled blocks hide their
    modules). The rest as given to loop.train; the world size may differ. ConfigError if the checkpoint is damaged.
    """
    content = read(path)
    for key, ours in (("global_batch", plan.total), ("seed", engine.seed)):
        if content[key] != ours:
            raise ConfigError(f"run.{key}", ours, f"the capsule's run had {content[key]}", "use the run's own config")
    position = 0
    if content["checkpoint"]:
        state = engine.state()
        healthy = find_checkpoint(path.parents[1] / content["checkpoint"])
        position = int(checkpoints.load(healthy, state)["position"])
        engine.load_state(state)
    data = batches(position)
    while position < content["position"]:
        micro_batches = [prepare(next(data)) for _ in range(plan.accumulation)]
        engine.step(micro_batches, schedule.rate(position), position)
        position += plan.total
    return again(engine, data, plan, prepare, schedule.rate(position), position)


def again(
    engine: Engine,
    data: Iterator[dict[str, Any]],
    plan: Batches,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    rate: float,
    position: int,
) -> Finding:
    """Take the next step of the data, watched. Collective; the weights change if it is finite."""
    raw = [next(data) for _ in range(plan.accumulation)]
    return examine(engine, [prepare(batch) for batch in raw], rate, position, [_samples(batch) for batch in raw])


def _samples(batch: dict[str, Any]) -> list[tuple[int, str]]:
    positions = batch["position"].tolist()
    return list(zip(positions, batch.get("key", [""] * len(positions)), strict=True))


def examine(
    engine: Engine,
    micro_batches: list[dict[str, Any]],
    rate: float,
    position: int,
    samples: list[list[tuple[int, str]]] | None = None,
) -> Finding:
    """One step with every module's output and its gradient checked; slow. samples: (position, key) by micro-batch."""
    engine.skipped()
    with watched(engine.student) as seen:
        engine.step(micro_batches, rate, position)
    reproduced = bool(engine.skipped())
    operation = None
    # Anomaly detection raises in the middle of a backward, where other ranks would wait for this one.
    if reproduced and not seen.module and engine.world.world == 1:
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                engine.step(micro_batches, rate, position)
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            operation = str(error)
    inputs = sorted({name for batch in micro_batches for name, value in batch.items() if not all_finite(value)})
    suspects = seen.suspects(samples or []) if reproduced else {}
    return Finding(position, reproduced, inputs, seen.module, seen.gradient, operation, suspects)


@dataclass
class Seen:
    """What the watch noticed first."""

    micro_batch: int = -1  # the one being run
    module: str | None = None
    gradient: str | None = None
    rows: tuple[int, int, list[int]] | None = None  # of the module's output: micro-batch, rows in all, bad rows

    def suspects(self, samples: list[list[tuple[int, str]]]) -> dict[int, str]:
        """The samples of the bad rows; every one where a row is no sample."""
        if self.rows and self.rows[0] < len(samples) and len(samples[self.rows[0]]) == self.rows[1]:
            return dict(samples[self.rows[0]][row] for row in self.rows[2])
        return dict(sample for batch in samples for sample in batch)


@contextmanager
def watched(student: nn.Module) -> Iterator[Seen]:
    """While entered, notice the first module whose output, and in the backward its gradient, is not finite."""
    seen = Seen()

    def begin(module: nn.Module, inputs: Any) -> None:
        seen.micro_batch += 1

    def watch(name: str) -> Callable[..., None]:
        def gradient(value: Tensor) -> None:
            if seen.gradient is None and not all_finite(value):
                seen.gradient = name

        def forward(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(gradient)
            if seen.module is None and not all_finite(output):
                seen.module = name
                if isinstance(output, Tensor) and output.ndim > 1:
                    bad = ~output.detach().flatten(1).isfinite().all(dim=1)
                    seen.rows = (seen.micro_batch, len(output), bad.nonzero().flatten().tolist())

        return forward

    handles = [student.register_forward_pre_hook(begin)]
    for name, module in student.named_modules():
        handles.append(module.register_forward_hook(watch(f"{name} ({type(module).__name__})".strip())))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def all_finite(value: Any) -> bool:
    """Whether every number in a tensor, or in a structure of them, is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(all_finite(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return all(all_finite(entry) for entry in value)
    return True
