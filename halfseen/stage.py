"""What every training stage does around its own three parts (data, student, prepare): open the run, derive the
numbers, restore or start, train, report."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

from halfseen import engines, loop, optim, origin, weights
from halfseen.checkpoint import Checkpoints, read_weights
from halfseen.config import Batches, ConfigError, duration
from halfseen.data import ImageSet, reading, train_batches
from halfseen.data.transforms import Transform
from halfseen.distributed import World, place
from halfseen.lock import held
from halfseen.monitor import Monitor
from halfseen.receipt import places, write_receipt
from halfseen.recipes import changes, find_recipe, load, stage_of, to_yaml
from halfseen.watchdog import Watchdog

Stage = TypeVar("Stage")

# Options that may differ when a run continues: they change how fast it goes or what it reports, never the curve.
FREE = (
    "engine.name",
    "engine.device",
    "engine.recompute",
    "engine.offload_activations",
    "engine.recompute_by",
    "engine.compile",
    "engine.shard_size",
    "engine.reshard",
    "engine.zero_stage",
    "engine.offload",
    "engine.extra",
    "engine.fairscale",
    "engine.skip_budget",
    "engine.rollback_budget",
    "data.train",  # the shards may have moved; their fingerprint decides
    "data.val",
    "data.eval_crop",
    "data.workers",
    "data.prefetch",
    "data.bad_limit",
    "data.cache",
    "data.cache_gib",
    "teacher.micro_batch",
    "teacher.channels_last",
    "teacher.compile",
    "store.folder",  # the answers may have moved; their description decides
    "store.missing",
    "target.codes.store.folder",
    "target.codes.store.missing",
    "run.folder",
    "run.init",
    "run.micro_batch",
    "run.keep",
    "run.async_save",
    "run.stall_minutes",
    "run.checkpoint_every",
    "run.log_every",
    "run.evaluate_every",
    "run.picture_every",
    "stages",  # each one's own folder says what it began with
    "task.keep_best",
    "online.",
    "monitor.",
)


@dataclass(frozen=True)
class Opened(Generic[Stage]):
    """A checked config and the folder it runs in."""

    config: Stage
    folder: Path
    resumed: bool  # the folder already held this run


def open_run(schema: type[Stage], argv: Sequence[str]) -> Opened[Stage]:
    """Turn ``RECIPE_OR_RUN key=value ...`` into a config and a run folder. Touches no device, writes nothing.

    A run folder continues exactly that run. A recipe whose run.folder already holds a run continues it too, if
    every option that shapes the curve is the same; otherwise ConfigError names the first one that is not.
    Options of the trunk that nobody states are those of run.init, and stated ones that differ are refused.
    """
    name = schema.__name__.lower()
    if not argv or {"-h", "--help"} & set(argv):
        print(f"usage: halfseen {name} RECIPE_OR_RUN_FOLDER [section.option=value ...]\n")
        print(f"options: halfseen recipes --fields {name}\nrecipes: halfseen recipes")
        raise SystemExit(0 if argv else 2)
    source, overrides = argv[0], list(argv[1:])
    stored = Path(source) / "config.yaml"
    if Path(source).is_dir():
        if not stored.is_file():
            raise ConfigError("run.folder", source, "is a folder without config.yaml", "name a run folder or a recipe")
        refuse_other_stage(name, stored, "run.folder", source, "halfseen {stage} " + source)
        config: Any = load(schema, stored, overrides)
        config.run.folder = source
    else:
        recipe = find_recipe(source)
        refuse_other_stage(name, recipe, "recipe", source, "halfseen {stage} " + source)
        config = origin.adopted(schema, recipe, overrides)
        config.run.folder = config.run.folder or f"runs/{Path(source).stem}"
    return open_config(schema, config)


def open_config(schema: type[Stage], config: Any) -> Opened[Stage]:
    """A checked config that names its folder, opened: ConfigError if the folder holds another run.

    What this number of ranks makes impossible is refused here too, before any of them waits for another.
    """
    name = schema.__name__.lower()
    launched = place(dict(os.environ))
    engines.refuse(config.engine, config.optim, launched.world if launched else None)
    if launched:
        Batches.derive(config.run.global_batch, launched.world, config.run.micro_batch)
    folder = Path(config.run.folder)
    stored = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.folder", config.run.folder, "is a file", "name a folder; a new one is made")
    if stored.is_file():
        refuse_other_stage(name, stored, "run.folder", config.run.folder, "give run.folder=ANOTHER_FOLDER")
        refuse_other_run(load(schema, stored), config, stored)
    elif config.run.init and not Path(config.run.init).exists():
        raise ConfigError("run.init", config.run.init, "there is no such file or folder", "check the path")
    return Opened(config, folder, stored.is_file())


def refuse_other_stage(name: str, file: Path, key: str, value: str, fix: str) -> None:
    """Raise ConfigError if a recipe or a run's config is another stage's; in fix, {stage} stands for that stage."""
    stage = stage_of(file)
    if stage and stage != name:
        raise ConfigError(key, value, f"belongs to {stage}, not to {name}", fix.replace("{stage}", stage))


def refuse_other_run(old: Any, new: Any, stored: Path) -> None:
    """Raise ConfigError if continuing ``old`` with ``new`` would not give the same curve."""
    before, after = changes(old), changes(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(FREE):
            raise ConfigError(
                key,
                after.get(key, "its default"),
                f"the run in {stored.parent} has {before.get(key, 'the default')!r}, and this option shapes the curve",
                "drop the override to resume that run, or give run.folder=ANOTHER_FOLDER for a new one "
                f"(run.init={stored.parent} starts it from that run's weights)",
            )


@dataclass(frozen=True)
class Spans:
    """The durations of a run, in images."""

    total: int
    warmup: int
    checkpoint: int
    log: int
    evaluate: int
    picture: int
    drops: tuple[int, ...] = ()  # positions at which schedule=steps lowers the rate

    @classmethod
    def derive(cls, config: Any, epoch: int, batch: int) -> "Spans":
        """Resolve the duration options. The run ends on a whole step: total is rounded up to the global batch."""

        def resolve(key: str, total: int | None = None) -> int:
            section, _, name = key.partition(".")
            text = getattr(getattr(config, section), name)
            return duration(key, text, epoch=epoch, total=total, batch=batch)

        total = resolve("run.images")
        if total < batch:
            raise ConfigError("run.images", config.run.images, f"is less than one step of {batch}", "train longer")
        total = -(-total // batch) * batch
        spans = {
            name: resolve(key, total)
            for name, key in {
                "warmup": "optim.warmup",
                "checkpoint": "run.checkpoint_every",
                "log": "run.log_every",
                "evaluate": "run.evaluate_every",
                "picture": "run.picture_every",
            }.items()
        }
        if spans["warmup"] >= total:
            raise ConfigError(
                "optim.warmup",
                config.optim.warmup,
                f"is {spans['warmup']} images, the whole run of {total}",
                "shorten it, e.g. optim.warmup=5%",
            )
        for name in ("checkpoint", "log"):
            if spans[name] < 1:
                raise ConfigError(f"run.{name}_every", getattr(config.run, f"{name}_every"), "is no time", "use 5%")
        drops = [duration("optim.drops", text, epoch=epoch, total=total, batch=batch) for text in config.optim.drops]
        for text, drop in zip(config.optim.drops, drops):
            if not spans["warmup"] <= drop < total:
                reason = (
                    f"is at {drop} images, not between the warm-up's end ({spans['warmup']}) and the run's ({total})"
                )
                raise ConfigError("optim.drops", text, reason, "name times within the run, e.g. optim.drops=[87.5%]")
        return cls(total, **spans, drops=tuple(drops))


def derive(config: Any, train_set: ImageSet, world: World) -> tuple[Batches, Spans]:
    """Batch split and durations of a run; refuses what cannot be divided."""
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
    newest = checkpoints.newest()
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
            (folder / "config.yaml").write_text(to_yaml(config))
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
    """0 when the run is complete; 75 (EX_TEMPFAIL) when a signal stopped it: run it again to continue."""
    return os.EX_TEMPFAIL if outcome.stopped_by else 0
