"""``halfseen bench engine``: what each engine costs over the plain step, and what a checkpoint costs the run.

Every engine has processes of its own, which wait while another one's turn is timed: all see the same machine, and none
shares a library's state with another.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfseen import config as options
from halfseen import distributed, engine_config, engines, optim, receipt
from halfseen.checkpoint import Checkpoints
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.pretrain import objectives, targets
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.train import Prepare
from halfseen.recipes import load

from .bench_step import device_of, spread

PLAIN = "plain"  # forward, backward, fused AdamW: no engine
NAMES = [name for name in typing.get_args(typing.get_type_hints(engine_config.Engine)["name"]) if name != "auto"]
PATIENCE = 600.0  # seconds for one answer
RATE = 1e-4


def main(argv: Sequence[str]) -> int:
    """``halfseen bench engine [RECIPE] [key=value ...] [options]``; returns the exit code."""
    arguments = parse(argv)
    recipe = arguments.items[0] if arguments.items and "=" not in arguments.items[0] else "pretrain/demo"
    overrides = [item for item in arguments.items if "=" in item]
    for engine in arguments.engines:
        settings(recipe, overrides, engine)  # refuses before anything is started
    device = device_of(settings(recipe, overrides, PLAIN).engine.device)
    with tempfile.TemporaryDirectory(prefix="halfseen-bench-") as folder, contextlib.ExitStack() as stack:
        crews = []
        for engine, ranks in [(PLAIN, 1), *((name, ranks) for ranks in arguments.ranks for name in arguments.engines)]:
            if alone(engine) and ranks > 1:
                continue
            crew = Crew(engine, ranks)
            stack.enter_context(crew.started(recipe, overrides, arguments, Path(folder)))
            crews.append(crew)
        time_steps(crews, arguments.repeats)
        for crew in crews[1:]:
            crew.save(arguments.saves)
        result = report(crews, arguments, recipe, overrides, device)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def listed(text: str) -> list[str]:
    """The entries of a,b,c."""
    return [item for item in text.split(",") if item]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""

    def counts(text: str) -> list[int]:
        return [int(item) for item in listed(text)]

    parser = argparse.ArgumentParser(prog="halfseen bench engine", description=__doc__)
    parser.add_argument("items", nargs="*", metavar="RECIPE | key=value", help="what to train (pretrain/demo)")
    named = "names with options of theirs: NAME:option=value:...,NAME (all)"
    parser.add_argument("--engines", type=listed, default=NAMES, help=named)
    several = [1] if torch.cuda.device_count() == 1 else [1, 2]  # two ranks cannot share a GPU
    parser.add_argument("--ranks", type=counts, default=several, help="numbers of processes (1,2; on one GPU 1)")
    parser.add_argument("--batch", type=int, default=8, help="images per rank and step (8)")
    parser.add_argument("--repeats", type=int, default=8, help="timed turns of each, interleaved (8)")
    parser.add_argument("--steps", type=int, default=2, help="steps in one turn (2)")
    parser.add_argument("--saves", type=int, default=3, help="timed checkpoints of each engine and kind; 0: none (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank on the CPU (1)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_intermixed_args(list(argv))


def settings(recipe: str, overrides: Sequence[str], engine: str) -> Pretrain:
    """The recipe's config under one engine, as named on the command line. ConfigError for what it cannot do."""
    name, *own = engine.split(":")
    chosen = "auto" if engine == PLAIN else name
    config = load(Pretrain, recipe, [*overrides, f"engine.name={chosen}", *(f"engine.{item}" for item in own)])
    engines.refuse(config.engine, config.optim, None)
    return config


def alone(engine: str) -> bool:
    """Whether the engine runs in one process only."""
    try:
        engines.refuse(engine_config.Engine(name=engine.partition(":")[0]), options.Optim(), 2)  # type: ignore[arg-type]
    except ConfigError:
        return True
    return False


# ------------------------------------------------------------------------------------------------ the processes


@dataclass
class Crew:
    """The processes of one engine, and what their turns took."""

    engine: str
    ranks: int
    pipes: list[Connection] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of a step, the slowest rank's
    cpu_seconds: list[float] = field(default_factory=list)  # of a step, mean over ranks, all threads
    memory: int = 0  # peak bytes of the largest rank: allocated on CUDA, resident on a CPU
    loss: float = 0.0  # of the last step
    saves: dict[str, Any] = field(default_factory=dict)
    make: "Callable[..., Job] | None" = None  # what a rank does instead of this engine's job; its arguments are Job's

    @contextlib.contextmanager
    def started(self, recipe: str, overrides: list[str], arguments: argparse.Namespace, folder: Path) -> Iterator[None]:
        """Inside, the processes wait for orders."""
        context = multiprocessing.get_context("forkserver")  # of a server that has imported this file, and no more
        context.set_forkserver_preload([__name__])
        port = free_port()
        place = folder / f"{self.engine.replace(':', '_')}-{self.ranks}"
        processes = []
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            task = (theirs, rank, self.ranks, port, recipe, overrides, self.engine, arguments, place, self.make or Job)
            processes.append(context.Process(target=serve, args=task, daemon=True))
            processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        try:
            self.answers()  # ready, warm
            yield
            for pipe in self.pipes:
                pipe.send(None)
            for process in processes:
                process.join(30)
        finally:
            for process in processes:  # after a failure others may wait for the one that failed
                process.kill()
                process.join()

    def ask(self, order: str, *details: Any) -> list[Any]:
        """Give every rank an order and wait for all answers."""
        for pipe in self.pipes:
            pipe.send((order, *details))
        return self.answers()

    def answers(self) -> list[Any]:
        """One answer of each rank.

        The first failure is raised: ConfigError for refused options, MemoryError for a full device, else RuntimeError.
        """
        found: dict[int, Any] = {}
        while len(found) < self.ranks:
            missing = {rank: pipe for rank, pipe in enumerate(self.pipes) if rank not in found}
            ready = wait(list(missing.values()), PATIENCE)
            for rank, pipe in missing.items():
                if pipe in ready or not ready:
                    found[rank] = self._answer(rank, pipe)
        return [found[rank] for rank in range(self.ranks)]

    def _answer(self, rank: int, pipe: Connection) -> Any:
        try:
            good, answer = pipe.recv() if pipe.poll() else (False, f"no answer in {PATIENCE:.0f} s")
        except EOFError:
            good, answer = False, "the process died"
        if isinstance(answer, ConfigError | MemoryError):
            raise answer
        if not good:
            raise RuntimeError(f"{self.engine}, rank {rank} of {self.ranks}: {answer}")
        return answer

    def turn(self) -> None:
        """One timed turn."""
        answers = self.ask("steps")
        self.seconds.append(max(answer["seconds"] for answer in answers))
        self.cpu_seconds.append(sum(answer["cpu_seconds"] for answer in answers) / self.ranks)
        self.memory = max(answer["memory"] for answer in answers)
        self.loss = answers[0]["loss"]

    def save(self, count: int) -> None:
        """Time checkpoints, rank 0's figures: synchronous ones, then ones written beside the training."""
        if count:
            self.saves = {kind: self.ask("save", kind == "beside", count)[0] for kind in ("waiting", "beside")}


def time_steps(crews: list[Crew], repeats: int) -> None:
    """Let every crew take its turn once per round, in an order that turns with the round."""
    for number in range(repeats):
        first = number % len(crews)
        for crew in crews[first:] + crews[:first]:
            crew.turn()


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------ in one process


def serve(
    pipe: Connection,
    rank: int,
    ranks: int,
    port: int,
    recipe: str,
    overrides: list[str],
    engine: str,
    arguments: argparse.Namespace,
    folder: Path,
    make: "Callable[..., Job]",
) -> None:
    """A rank: make the student, then do as told."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.set_num_threads(arguments.threads)
        config = settings(recipe, overrides, engine)
        with distributed.started(config.engine.device) as world:
            job = make(config, world, engine == PLAIN, arguments, folder)
            job.steps()
            pipe.send((True, None))
            while order := pipe.recv():
                pipe.send((True, getattr(job, order[0])(*order[1:])))
    except ConfigError as error:
        pipe.send((False, error))
    except Exception as error:
        # torch's own error, or one of CUDA or NCCL
        full = "out of memory" in str(error).lower()
        pipe.send((False, MemoryError(str(error)) if full else traceback.format_exc()))


class Job:
    """A student in its engine, or bare, with one resident batch of random images."""

    def __init__(
        self, config: Pretrain, world: World, plain: bool, arguments: argparse.Namespace, folder: Path
    ) -> None:
        self.world, self.count, self.folder, self.position = world, arguments.steps, folder, 0
        torch.manual_seed(config.run.seed)
        target = targets.create(config, world.device)
        student = objectives.create(config, target)
        side, batch = config.data.image_size, arguments.batch
        image = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        prepare = Prepare(config, target, world.device)
        position = torch.arange(batch) * world.world + world.rank
        self.batch = prepare({"image": image, "position": position, "key": [str(at) for at in position.tolist()]})
        self.images = batch * world.world
        groups = optim.groups(student, config.optim)
        if plain:
            self.engine = None
            self.one: Callable[[], Tensor] = plain_step(config, student.to(world.device), groups, self.batch)
        else:
            self.engine = engines.create(config.engine, student, config.optim, groups, world, config.run.seed)
            self.one = self._engine_step

    def _engine_step(self) -> Tensor:
        assert self.engine is not None
        loss = self.engine.step([self.batch], RATE, self.position)["loss"]
        self.position += self.images
        return loss

    def steps(self) -> dict[str, float]:
        """A turn: seconds per step on the clock and of the processor, peak memory, the last loss."""
        cuda = self.world.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.world.barrier()
        self._settle()
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(self.count):
            loss = self.one()
        self._settle()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": wall / self.count,
            "cpu_seconds": processor / self.count,
            "memory": torch.cuda.max_memory_allocated() if cuda else resident,
            "loss": float(loss),
        }

    def save(self, beside: bool, count: int) -> dict[str, Any]:
        """Write so many checkpoints: seconds each blocked the loop, seconds until it was published, bytes."""
        assert self.engine is not None
        store = Checkpoints(self.folder, 1, self.world, asynchronous=beside)
        blocked, published, size = [], [], 0
        for _ in range(count):
            self.one()
            self._settle()
            self.world.barrier()
            began = time.perf_counter()
            path = store.save(self.position, self.engine.state(), {})
            blocked.append(time.perf_counter() - began)
            store.wait()
            published.append(time.perf_counter() - began)
            size = sum(file.stat().st_size for file in path.iterdir())
        self.world.barrier()
        if self.world.main:
            shutil.rmtree(self.folder)
        return {"blocked": blocked, "published": published, "bytes": size}

    def _settle(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def plain_step(
    config: Pretrain, student: torch.nn.Module, groups: list[optim.Group], batch: dict[str, Any]
) -> Callable[[], Tensor]:
    """A training step as a script would write it: no check, no clipping, no averages."""
    student.train()
    optimizer = optim.build(config.optim, groups, dict(student.named_parameters()))
    optim.set_rate(optimizer, RATE)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.engine.precision)
    device = next(student.parameters()).device.type

    def step() -> Tensor:
        with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
            loss = student(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# ------------------------------------------------------------------------------------------------ the report


def report(
    crews: list[Crew], arguments: argparse.Namespace, recipe: str, overrides: list[str], device: str
) -> dict[str, Any]:
    """Everything measured, and where: what --json writes."""
    plain = crews[0]
    rows = []
    for crew in crews:
        row: dict[str, Any] = {"engine": crew.engine, "ranks": crew.ranks, "memory_bytes": crew.memory}
        for clock in ("seconds", "cpu_seconds"):
            own, bare = getattr(crew, clock), getattr(plain, clock)
            row[clock] = spread(own)
            row[f"{clock}_over_plain"] = spread([a / b for a, b in zip(own, bare, strict=True)])
        row["loss"] = crew.loss
        if crew.saves:
            row["checkpoint"] = {kind: saved(found, row["seconds"]["median"]) for kind, found in crew.saves.items()}
        rows.append(row)
    return {
        "recipe": recipe,
        "overrides": overrides,
        "images_per_rank": arguments.batch,
        "steps_per_turn": arguments.steps,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "rows": rows,
        "device": torch.cuda.get_device_name() if device == "cuda" else receipt.processor(),
        "versions": receipt.versions(),
        "source": receipt.source(),
    }


def saved(found: dict[str, Any], step: float) -> dict[str, Any]:
    """Of one kind of checkpoint: how long it held up the loop, in seconds and in steps, and how fast it was written."""
    first, *later = found["blocked"]
    usual = spread(later or [first])
    return {
        "bytes": found["bytes"],
        "blocked_first_seconds": first,
        "blocked_seconds": usual,
        "blocked_steps": usual["median"] / step,
        "bytes_per_second": found["bytes"] / spread(found["published"])["median"],
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['device']}, {result['threads']} threads a rank, {result['images_per_rank']} images a rank: "
        f"{' '.join([result['recipe'], *result['overrides']])}",
        "one step: processor seconds (mean over ranks) and seconds (slowest rank), each with the median ratio to the "
        "plain step of the same round and its quartiles",
    ]
    for row in result["rows"]:
        text = f"  {row['engine']:<28} x{row['ranks']}"
        for clock in ("cpu_seconds", "seconds"):
            ratio = row[f"{clock}_over_plain"]
            text += f"  {row[clock]['median']:8.4f} {ratio['median']:5.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
        lines.append(f"{text}  {row['memory_bytes'] / 2**20:6.0f} MiB")
    lines.append("checkpoint: seconds it blocks the loop (the first time), in steps, MiB/s until it is published")
    for row in result["rows"]:
        for kind, found in row.get("checkpoint", {}).items():
            lines.append(
                f"  {row['engine']:<28} x{row['ranks']} {kind:<8} {found['blocked_seconds']['median']:7.3f} "
                f"({found['blocked_first_seconds']:.3f})  {found['blocked_steps']:6.2f} steps  "
                f"{found['bytes'] / 2**20:7.1f} MiB at {found['bytes_per_second'] / 2**20:6.0f} MiB/s"
            )
    return "\n".join(lines)
