"""Numbers that follow from a config, the ranks and the data: the split of a global batch, and durations in images."""

from dataclasses import dataclass
from typing import Any

from halfseen.config import ConfigError, duration


@dataclass(frozen=True)
class Batches:
    """How one global batch is split: world ranks x accumulation micro-batches x micro images."""

    total: int  # images per update over all ranks
    world: int  # ranks
    micro: int  # images per rank and forward pass
    accumulation: int  # forward passes per update

    @classmethod
    def derive(cls, global_batch: int, world: int, micro_batch: int | None) -> "Batches":
        """Split a global batch; the micro-batch is the largest divisor of a rank's share within micro_batch.

        micro_batch: most images one rank holds at once; None: its whole share. Raises ConfigError for a batch that does
        not divide by the ranks, and where only less than half of micro_batch could be used.
        """
        if global_batch % world:
            nearest = max(world, round(global_batch / world) * world)
            raise ConfigError(
                "run.global_batch",
                global_batch,
                f"does not divide by the {world} ranks of this run",
                f"use a multiple of {world}, e.g. run.global_batch={nearest}, or another number of ranks",
            )
        share = global_batch // world
        most = min(share, micro_batch or share)
        micro = next(size for size in range(most, 0, -1) if share % size == 0)
        if micro_batch and micro * 2 <= most:
            raise ConfigError(
                "run.micro_batch",
                micro_batch,
                f"a rank's share of {share} images has no divisor between {micro + 1} and {micro_batch}, "
                f"so only {micro} images would run at once",
                f"choose run.global_batch so that global_batch / {world} is a multiple of {micro_batch}",
            )
        return cls(global_batch, world, micro, share // micro)

    def __str__(self) -> str:
        return f"{self.total} images = {self.world} ranks x {self.accumulation} micro-batches x {self.micro}"


@dataclass(frozen=True)
class Spans:
    """The durations of a run, in images."""

    total: int  # length of the run
    warmup: int
    checkpoint: int  # from one checkpoint to the next; so for the others
    log: int
    evaluate: int  # 0: never, as for pictures
    picture: int
    drops: tuple[int, ...] = ()  # positions at which schedule=steps lowers the rate

    @classmethod
    def derive(cls, config: Any, epoch: int, batch: int) -> "Spans":
        """Resolve the duration options of a config with the sections run and optim.

        epoch: images in one pass over the data. batch: global batch. The run ends on a whole step: total is rounded up
        to the global batch. Raises ConfigError for a run shorter than a step, and for times that do not lie within it.
        """

        def resolve(key: str, total: int | None = None) -> int:
            section, _, name = key.partition(".")
            text = getattr(getattr(config, section), name)
            return duration(key, text, epoch=epoch, total=total, batch=batch)

        total = resolve("run.images")
        if total < batch:
            reason = f"is {total:,} images, less than one step of {batch:,}"
            raise ConfigError("run.images", config.run.images, reason, "train longer, or lower run.global_batch")
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
