"""``halfseen teach RECIPE store.folder=FOLDER``: ask a distillation recipe's teacher once, and keep what it says.

Takes the options of the run that will learn from it. Shards that are there already are left as they are, so an
interrupted call continues; under torchrun each rank makes its share. --audit makes some answers anew and compares.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from halfseen import data, distributed
from halfseen.classification.prepare import Prepare
from halfseen.config import Batches, ConfigError, duration, load
from halfseen.data.hashing import mix, purpose
from halfseen.data.transforms import finetune_transform
from halfseen.data.writer import ShardWriter
from halfseen.distributed import World
from halfseen.pretrain.distill import store
from halfseen.pretrain.distill.config import Distill
from halfseen.pretrain.distill.teacher import Live
from halfseen.pretrain.distill.train import live_teacher

SLACK = 0.02  # an answer made anew may differ by this share of its peak beyond what storing lost: other kernels, bf16


class Blocks:
    """Views and answers of consecutive positions, block by block, as one rank alone would have them."""

    def __init__(self, config: Distill, train_set: data.ImageSet, ask: Live, world: World) -> None:
        self.size = store.block_of(config)
        self.plan = Batches(self.size, 1, self.size, 1)
        # The stride comes from the run's global batch, not from a block.
        task = replace(config.task, mix_stride=store.stride_of(config))
        self.config, self.train_set, self.ask, self.device = replace(config, task=task), train_set, ask, world.device
        self.prepare = Prepare(self.config, self.plan, world.device)

    def of(self, first: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Sample keys and answers of each block from a position on, endlessly."""
        config = self.config
        stream = data.train_batches(
            self.train_set,
            config.data,
            finetune_transform(config.augment, config.data.image_size),
            seed=config.run.seed,
            start=first,
            plan=self.plan,
            rank=0,
            pin=self.device.type == "cuda",
        )
        for batch in stream:
            yield batch["key"], self.ask(self.prepare(batch)["image"])


def main(argv: Sequence[str]) -> int:
    """Make a store, or audit one; returns 1 if an audit finds an answer that is not the teacher's."""
    parser = argparse.ArgumentParser(prog="halfseen teach", description=__doc__)
    parser.add_argument("recipe", help="a distillation recipe")
    parser.add_argument("overrides", nargs="*", help="options, e.g. store.folder=/data/answers store.top=100")
    parser.add_argument("--audit", type=int, metavar="N", help="make N stored blocks anew and compare, instead")
    arguments = parser.parse_intermixed_args(argv)
    config = load(Distill, arguments.recipe, arguments.overrides)
    if not config.store.folder:
        raise ConfigError("store.folder", "", "names no folder", "e.g. store.folder=/data/answers")
    with distributed.started(config.engine.device) as world:
        train_set = data.open_set(config.data, "train")
        live = live_teacher(config, world)
        blocks = Blocks(config, train_set, live, world)
        described = store.describe(config, train_set) | {store.DIGEST: live.teacher.digest()}
        if arguments.audit is not None:
            store.refuse_other(Path(config.store.folder), described)
            return audit(config, blocks, arguments.audit) if world.main else 0
        if world.main:
            store.create(Path(config.store.folder), described)
        world.barrier()
        store.refuse_other(Path(config.store.folder), described)
        teach(config, blocks, total_of(config, train_set), world)
    return 0


def total_of(config: Distill, train_set: data.ImageSet) -> int:
    """Positions to store."""
    key, text = ("store.images", config.store.images) if config.store.images else ("run.images", config.run.images)
    return duration(key, text, epoch=train_set.images, batch=config.run.global_batch)


def teach(config: Distill, blocks: Blocks, total: int, world: World) -> None:
    """Write the shards that are missing. Collective."""
    folder, span = Path(config.store.folder), store.span_of(config)
    firsts = list(range(0, total, span))
    mine = [first for number, first in enumerate(firsts) if number % world.world == world.rank]
    lost: dict[str, float] = {}
    for first in mine:
        path = folder / store.shard_name(first)
        if path.is_file():
            continue
        began = time.perf_counter()
        for name, value in write_shard(path, first, span, blocks, config.store).items():
            lost[name] = max(lost.get(name, 0.0), value)
        speed = span / (time.perf_counter() - began)
        print(f"{path.name}  {span:,} positions, {speed:,.0f} img/s, {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    found = world.gather_object(lost)
    if world.main:
        names = sorted({name for each in found for name in each})
        worst = {name: max(each.get(name, 0.0) for each in found) for name in names}
        print(f"{len(firsts)} shards of {span:,} positions in {folder}")
        for name, value in worst.items():
            unit = "of a probability" if name == "scores" else "of a token's largest channel"
            print(f"  {name}: storing lost at most {value:.2e} {unit}")


def write_shard(path: Path, first: int, span: int, blocks: Blocks, cfg: store.StoreConfig) -> dict[str, float]:
    """Write one shard whole; returns the largest loss of each entry."""
    lost: dict[str, float] = {}
    answers = blocks.of(first)
    with ShardWriter(path) as writer:
        for place in range(first, first + span, blocks.size):
            keys, answer = next(answers)
            for name, value in store.write_block(writer, place, keys, answer, cfg).items():
                lost[name] = max(lost.get(name, 0.0), value)
    return lost


def audit(config: Distill, blocks: Blocks, count: int) -> int:
    """Make ``count`` of the stored blocks anew; prints how far each is off and returns 1 if one is too far."""
    folder, span = Path(config.store.folder), store.span_of(config)
    stored = store.Stored(folder, blocks.size, span, config.data.classes, torch.device("cpu"))
    shards = sorted(int(path.stem.removeprefix("positions-")) for path in folder.glob("positions-*.tar"))
    places = [first + block * blocks.size for first in shards for block in range(span // blocks.size)]
    # Which ones depends on the store's own size, so a repeated audit of a grown store looks elsewhere.
    order = sorted(places, key=lambda place: mix(config.run.seed, purpose("audit"), len(places), place))
    wrong = 0
    for place in order[:count]:
        keys, answer = next(blocks.of(place))
        bound = stored.shard(place // span * span).errors(place % span // blocks.size)
        try:
            kept = stored(torch.arange(place, place + blocks.size), keys)
        except store.Missing as reason:
            print(f"position {place:,}: {reason}")
            wrong += 1
            continue
        apart = store.losses_of(answer, kept)
        bad = [name for name in apart if apart[name] > bound[name] + SLACK]
        wrong += bool(bad)
        numbers = ", ".join(f"{name} {value:.2e} (stored with {bound[name]:.2e})" for name, value in apart.items())
        print(f"position {place:,}: {'WRONG ' + ', '.join(bad) if bad else 'as stored'}; off by {numbers}")
    print(f"{min(count, len(places))} of {len(places)} blocks looked at, {wrong} wrong")
    return 1 if wrong else 0
