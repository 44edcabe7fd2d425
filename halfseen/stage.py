"""What every training stage does around its own parts (data, student, prepare): derive the numbers, restore or start,
train, report. halfseen/opening.py comes before it."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from halfseen import engines, loop, optim, signals, weights
from halfseen.checkpoint import Checkpoints, read_weights
from halfseen.config import ConfigError
from halfseen.data import ImageSet, reading, train_batches
from halfseen.data.transforms import Transform
from halfseen.derived import Batches, Spans
from halfseen.distributed import World
from halfseen.lock import held
from halfseen.monitor import Monitor
from halfseen.opening import Opened
from halfseen.receipt import places, write_receipt
from halfseen.recipes import changes, to_yaml
from halfseen.watchdog import Watchdog
from halfseen.writing import write_whole


def derive(config: Any, train_set: ImageSet, world: World) -> tuple[Batches, Spans]:
    """Batch split and durations of a run. Collective.

    Raises ConfigError for a batch that cannot be divided, durations that make no sense, and ranks that see other data.
    """
    batches = Batches.derive(config.run.global_batch, world.world, config.run.micro_batch)
    refuse_different_data(train_set, world)
    return batches, Spans.derive(config, train_set.images, batches.total)


def refuse_different_data(train_set: ImageSet, world: World) -> None:
    """Raise ConfigError if some rank sees other shards than rank 0, e.g. an old copy on its node's disk. Collective."""
    prints = world.gather_object(train_set.fingerprint)
    for rank, fingerprint in enumerate(prints):
        if fingerprint != prints[0]:
            raise ConfigError(
                "data.train",
                fingerprint[:12],
                f"rank {rank} sees other shards than rank 0 (fingerprint {prints[0][:12]})",
                "give every node the same shards: names, sizes and indexes must be equal",
            )


def announce(config: Any, folder: Path, parts: "Parts", world: World) -> None:
    """Print what was resolved: options that differ from the defaults, batch, durations, rate, data."""
    if not world.main:
        return
    batches, spans, train_set = parts.batches, parts.spans, parts.train_set
    for key, value in changes(config).items():
        print(f"  {key} = {value}")
    epochs = spans.total / train_set.images
    print(f"run       {folder}")
    print(f"data      {train_set.images:,} images per epoch, fingerprint {train_set.fingerprint[:12]}")
    print(f"batch     {batches}")
    print(f"length    {spans.total:,} images = {spans.total // batches.total:,} steps = {epochs:.4g} epochs")
    if parts.period and parts.period < spans.total:
        print(f"repeats   after {parts.period:,} images: the same samples, crops, mixing and masks again")
    print(f"every     logs {spans.log:,} images, saves {spans.checkpoint:,}")
    peak = config.optim.peak(batches.total)
    print(f"rate      peak {peak:.4g} after {spans.warmup:,} images, {config.optim.schedule}")
    if config.data.lanes % world.world:
        multiple = -(-config.data.lanes // world.world) * world.world
        print(
            f"note      data.lanes={config.data.lanes} is not a multiple of {world.world} ranks: the order is equal, "
            f"but several ranks read each shard; a new run should use e.g. data.lanes={multiple}"
        )
    print(f"device    {world.device}, {config.engine.precision}", flush=True)


def initialise(student: nn.Module, config: Any, world: World) -> None:
    """Weights only, from run.init: never position, optimizer or averages."""
    try:
        given = read_weights(config.run.init, config.run.init_part)
    except ConfigError as refused:
        raise ConfigError("run.init", config.run.init, refused.reason, refused.fix) from refused
    down, across = config.run.init_grid or (0, 0)
    grid = (down, across) if down else None
    report = weights.initialise(student, given, coverage=config.run.init_coverage, grid=grid)
    if world.main:
        print(report)


@dataclass(frozen=True)
class Parts:
    """What a stage is made of, apart from the run: all that a step needs, whether it trains or is replayed.

    stream(start) yields this rank's micro-batches from a position on; prepare moves one to the device and adds mask
    and target. layer_of and layers: layer-wise rates. begin: what a student takes from data before its first step,
    called when no checkpoint is loaded. A stage's ``parts(config, world, folder)`` makes them.
    """

    student: nn.Module
    train_set: ImageSet
    batches: Batches
    spans: Spans
    stream: Callable[[int], Iterator[dict[str, Any]]]
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    layer_of: Callable[[str], int] | None = None
    layers: int = 0
    begin: Callable[[], None] | None = None
    period: int | None = None  # after so many images the stream begins again; None: never
    groups: list[optim.Group] | None = None  # of parameters, where layers are not what tells their rates

    def schedule(self, config: Any) -> optim.Schedule:
        """The rate at every position."""
        peak = config.optim.peak(self.batches.total)
        spans = self.spans
        return optim.Schedule(config.optim, peak, spans.warmup, spans.total, self.batches.total, spans.drops)

    def reads(self, config: Any) -> Callable[[int, int, int], str]:
        """What a rank reads at a position, in words: see data.reading."""
        words = reading(self.train_set, config.data, config.run.seed, self.batches)
        period = self.period
        return words if period is None else lambda rank, position, number: words(rank, position % period, number)

    def engine(self, config: Any, world: World, fresh: bool) -> engines.Engine:
        """The student in its engine; fresh: no checkpoint will be loaded, so its weights are run.init's or random."""
        if fresh and config.run.init:
            initialise(self.student, config, world)
        if fresh and self.begin:
            self.begin()
        groups = self.groups or optim.groups(self.student, config.optim, self.layer_of, self.layers)
        return engines.create(config.engine, self.student, config.optim, groups, world, config.run.seed)


def stream(
    config: Any,
    train_set: ImageSet,
    transform: Transform,
    batches: Batches,
    world: World,
    folder: Path,
    **more: Any,
) -> Callable[[int], Iterator[dict[str, Any]]]:
    """Parts.stream: data.train_batches, and ``more`` of its options. Bad samples go to the run's ledger."""

    def from_position(start: int) -> Iterator[dict[str, Any]]:
        return train_batches(
            train_set,
            config.data,
            transform,
            seed=config.run.seed,
            start=start,
            plan=batches,
            rank=world.rank,
            ledger=folder / "ledger.jsonl",
            pin=world.device.type == "cuda",
            **more,
        )

    return from_position


def run(
    opened: Opened[Any],
    parts: Parts,
    world: World,
    *,
    evaluate: Callable[[engines.Engine, Monitor, int], dict[str, float]] | None = None,
    picture: Callable[[engines.Engine, Monitor, int], None] | None = None,
) -> loop.Outcome:
    """Train one student in one run folder: own checkpoint, else run.init, else from scratch.

    evaluate and picture are called when due, on every rank.
    """
    config, folder = opened.config, opened.folder
    train_set, batches, spans = parts.train_set, parts.batches, parts.spans
    with held(folder, world):
        checkpoints = Checkpoints(folder / "checkpoints", config.run.keep, world, config.run.async_save)
        engine, start, skipped = restored(opened, parts, world, checkpoints)
        record(opened, parts, world, engine, start)
        flops = float(cast(Any, parts.student).train_flops_per_image())
        monitor = Monitor(folder, config.monitor, total=spans.total, start=start, world=world, flops_per_image=flops)
        reads = parts.reads(config)
        with closing(monitor), Watchdog(folder, config.run.stall_minutes, world, reads) as watchdog:
            return loop.train(
                engine=engine,
                batches=parts.stream,
                plan=batches,
                prepare=parts.prepare,
                schedule=parts.schedule(config),
                monitor=monitor,
                checkpoints=checkpoints,
                world=world,
                start=start,
                total=spans.total,
                checkpoint_every=spans.checkpoint,
                log_every=spans.log,
                evaluate_every=spans.evaluate,
                evaluate=evaluate and (lambda position: evaluate(engine, monitor, position)),
                picture_every=spans.picture,
                picture=picture and (lambda position: picture(engine, monitor, position)),
                meta=lambda position: {"fingerprint": train_set.fingerprint, "config": to_yaml(config)},
                beat=watchdog.beat,
                skipped=skipped,
            )


def restored(
    opened: Opened[Any], parts: Parts, world: World, checkpoints: Checkpoints
) -> tuple[engines.Engine, int, int]:
    """The engine where the run stands, the position, and how many updates were skipped before. Collective.

    How the weights start: 1. this run's newest healthy checkpoint, 2. run.init, 3. random.
    """
    newest = checkpoints.to_continue()
    engine = parts.engine(opened.config, world, fresh=newest is None)
    if newest is None:
        return engine, 0, 0
    state = engine.state()
    meta = checkpoints.load(newest, state)
    refuse_other_data(meta, parts.train_set)
    engine.load_state(state)
    start, batch = meta["position"], parts.batches.total
    if start % batch:
        reason = f"the run stands at {start}, not a multiple of it"
        raise ConfigError("run.global_batch", batch, reason, "keep the old one")
    if world.main:
        print(f"resumed   {newest.name}: {start:,} of {parts.spans.total:,} images done", flush=True)
    return engine, start, meta.get("skipped", 0)


def record(opened: Opened[Any], parts: Parts, world: World, engine: engines.Engine, start: int) -> None:
    """Write what this start is into the run folder: config, the engine's files, a line of the receipt. Collective."""
    config, folder = opened.config, opened.folder
    ranks = places(world)
    if world.main:
        if not opened.resumed:
            write_whole(folder / "config.yaml", to_yaml(config))  # half of it would be another run's config
        for name, text in engine.files.items():
            (folder / name).write_text(text)
        fingerprint = parts.train_set.fingerprint
        write_receipt(folder, config=config, world=world, fingerprint=fingerprint, start=start, ranks=ranks)
        if start >= parts.spans.total:
            print("complete  nothing is left to do; evaluate it, or use it as run.init of another run", flush=True)
    world.barrier()


def refuse_other_data(meta: dict[str, Any], train_set: ImageSet) -> None:
    """Raise ConfigError if the checkpoint was made over other shards: the order would silently differ."""
    if meta["fingerprint"] != train_set.fingerprint:
        raise ConfigError(
            "data.train",
            train_set.fingerprint[:12],
            f"these shards are not the ones this run began with (fingerprint {meta['fingerprint'][:12]})",
            "point data.train at the same shards, or start a new run with run.init=THIS_RUN",
        )


def seed_weights(seed: int) -> None:
    """Make random initial weights equal on every rank."""
    torch.manual_seed(seed)


def exit_code(outcome: loop.Outcome) -> int:
    """0 when the run is complete; signals.SAVED when a signal stopped it: run it again to continue."""
    return signals.SAVED if outcome.stopped_by else 0
