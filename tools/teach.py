"""``halfseen teach RECIPE store.folder=FOLDER``: ask a frozen network once, and keep what it says.

RECIPE is a distillation, whose teacher is asked, or a pretraining on codes, whose tokenizer is asked (then the folder
is target.codes.store.folder). Takes the options of the run that will learn from it. Shards that are there already are
left as they are, so an interrupted call continues; under torchrun each rank makes its share. --audit makes some answers
anew and compares.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halfseen import data, distributed
from halfseen.classification.prepare import Prepare
from halfseen.config import ConfigError
from halfseen.data.hashing import mix, purpose
from halfseen.data.transforms import finetune_transform
from halfseen.data.writer import ShardWriter
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.pretrain import store, stored_codes
from halfseen.pretrain import train as pretrain
from halfseen.pretrain.config import Pretrain
from halfseen.pretrain.distill import store as answers
from halfseen.pretrain.distill.config import Distill
from halfseen.pretrain.distill.teacher import Live
from halfseen.pretrain.distill.train import live_teacher
from halfseen.pretrain.targets.codes import Codes
from halfseen.recipes import find_recipe, load, stage_of

SCHEMAS = {"distill": Distill, "pretrain": Pretrain}
SLACK = 0.02  # an answer made anew may differ by this share of its peak beyond what storing lost: other kernels, bf16


class Asked(Protocol):
    """A frozen network, asked about consecutive positions, block by block, as one rank alone would ask it."""

    cfg: store.StoreConfig
    key: str  # of that section
    size: int  # positions in a block
    span: int  # positions in a shard
    described: Mapping[str, Any]  # everything the answers depend on
    units: Mapping[str, str]  # of what storing loses; "" for entries that are not named

    def of(self, first: int) -> Iterator[tuple[list[str], Any]]:
        """Sample keys and answers of each block from a position on, endlessly."""

    def packed(self, answer: Any) -> dict[str, np.ndarray]:
        """The arrays that are stored of a block's answer."""

    def apart(self, answer: Any, arrays: Mapping[str, Tensor]) -> dict[str, float]:
        """How far stored arrays are from an answer, by entry."""


class Teacher:
    """A distillation's teacher; see Asked."""

    key = "store"
    units: Mapping[str, str] = {"scores": "of a probability", "": "of a token's largest channel"}

    def __init__(self, config: Distill, train_set: data.ImageSet, ask: Live, world: World) -> None:
        self.cfg, self.size, self.span = config.store, answers.block_of(config), answers.span_of(config)
        self.plan = Batches(self.size, 1, self.size, 1)
        # The stride comes from the run's global batch, not from a block.
        task = replace(config.task, mix_stride=answers.stride_of(config))
        self.config, self.train_set, self.ask, self.device = replace(config, task=task), train_set, ask, world.device
        self.prepare = Prepare(self.config, self.plan, world.device)
        self.described = answers.describe(config, train_set) | {answers.DIGEST: ask.teacher.digest()}

    def of(self, first: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """See Asked."""
        transform = finetune_transform(self.config.augment, self.config.data.image_size)
        for batch in views(self.config, self.train_set, transform, self.plan, first, self.device):
            yield batch["key"], self.ask(self.prepare(batch)["image"])

    def packed(self, answer: dict[str, Any]) -> dict[str, np.ndarray]:
        """See Asked."""
        return answers.packed(answer, self.config.store, self.size)

    def apart(self, answer: dict[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, float]:
        """See Asked."""
        return answers.losses_of(answer, answers.unpacked(arrays, self.config.data.classes))


class Tokenizer:
    """The tokenizer of a pretraining on codes; see Asked."""

    key = stored_codes.KEY
    units: Mapping[str, str] = {"": "of the codes"}

    def __init__(self, config: Pretrain, train_set: data.ImageSet, ask: Codes, world: World) -> None:
        self.cfg, self.size, self.span = config.target.codes.store, store.BLOCK, stored_codes.span_of(config)
        self.plan = Batches(self.size, 1, self.size, 1)
        self.config, self.train_set, self.ask, self.device = config, train_set, ask, world.device
        self.prepare = pretrain.Prepare(config, ask, world.device)
        self.described = stored_codes.describe(config, train_set) | stored_codes.describe_tokenizer(ask)

    def of(self, first: int) -> Iterator[tuple[list[str], Tensor]]:
        """See Asked."""
        transform = pretrain.transform_of(self.config, live=True)
        most = self.config.run.micro_batch or self.size
        for batch in views(self.config, self.train_set, transform, self.plan, first, self.device):
            seen = self.prepare.views(batch)
            parts = [{name: value[place : place + most] for name, value in seen.items()}
                     for place in range(0, self.size, most)]  # fmt: skip
            yield batch["key"], torch.cat([self.ask(part) for part in parts])

    def packed(self, answer: Tensor) -> dict[str, np.ndarray]:
        """See Asked."""
        return stored_codes.packed(answer, self.ask.width)

    def apart(self, answer: Tensor, arrays: Mapping[str, Tensor]) -> dict[str, float]:
        """See Asked."""
        return {"codes": stored_codes.apart(answer, arrays["codes"])}


def views(
    config: Any, train_set: data.ImageSet, transform: Any, plan: Batches, first: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Blocks of consecutive positions from one on, as the loader gives them."""
    pin = device.type == "cuda"
    return data.train_batches(
        train_set, config.data, transform, seed=config.run.seed, start=first, plan=plan, rank=0, pin=pin
    )


def main(argv: Sequence[str]) -> int:
    """Make a store, or audit one; returns 1 if an audit finds an answer that is not the network's."""
    parser = argparse.ArgumentParser(prog="halfseen teach", description=__doc__)
    parser.add_argument("recipe", help="a distillation recipe, or a pretraining recipe whose targets are codes")
    parser.add_argument("overrides", nargs="*", help="options, e.g. store.folder=/data/answers store.top=100")
    parser.add_argument("--audit", type=int, metavar="N", help="make N stored blocks anew and compare, instead")
    arguments = parser.parse_intermixed_args(argv)
    config = load(schema_of(arguments.recipe), arguments.recipe, arguments.overrides)
    with distributed.started(config.engine.device) as world:
        asked, total = open_asked(config, world)
        folder = Path(asked.cfg.folder)
        if arguments.audit is not None:
            store.refuse_other(folder, asked.described, f"{asked.key}.folder")
            return audit(asked, config.run.seed, arguments.audit) if world.main else 0
        if world.main:
            store.create(folder, asked.described, f"{asked.key}.folder")
        world.barrier()
        store.refuse_other(folder, asked.described, f"{asked.key}.folder")
        teach(asked, total, world)
    return 0


def schema_of(recipe: str) -> Any:
    """The options of a recipe's stage; a recipe that says none is a distillation. ConfigError for other stages."""
    stage = stage_of(find_recipe(recipe)) or "distill"
    if stage not in SCHEMAS:
        fix = "name a distillation, or a pretraining on codes"
        raise ConfigError("recipe", recipe, f"belongs to {stage}, which asks no frozen network", fix)
    return SCHEMAS[stage]


def section_of(config: Any) -> tuple[store.StoreConfig, str]:
    """The section that says where and how answers are kept, and its key."""
    return (config.target.codes.store, stored_codes.KEY) if isinstance(config, Pretrain) else (config.store, "store")


def length_of(config: Any, epoch: int) -> int:
    """Positions to store; epoch: images of one."""
    return store.length_of(config, *section_of(config), epoch)


def open_asked(config: Any, world: World) -> tuple[Asked, int]:
    """What a recipe asks, and positions to store. ConfigError if it names no folder."""
    cfg, key = section_of(config)
    if not cfg.folder:
        raise ConfigError(f"{key}.folder", "", "names no folder", f"e.g. {key}.folder=/data/answers")
    asked: Asked
    if isinstance(config, Pretrain):
        train_set = pretrain.open_train_set(config)
        asked = Tokenizer(config, train_set, stored_codes.live(config, world.device), world)
    else:
        train_set = data.open_set(config.data, "train")
        asked = Teacher(config, train_set, live_teacher(config, world), world)
    return asked, length_of(config, train_set.images)


def teach(asked: Asked, total: int, world: World) -> None:
    """Write the shards that are missing. Collective."""
    folder, span = Path(asked.cfg.folder), asked.span
    firsts = list(range(0, total, span))
    mine = [first for number, first in enumerate(firsts) if number % world.world == world.rank]
    lost: dict[str, float] = {}
    for first in mine:
        path = folder / store.shard_name(first)
        if path.is_file():
            continue
        began = time.perf_counter()
        for name, value in write_shard(path, first, asked).items():
            lost[name] = max(lost.get(name, 0.0), value)
        speed = span / (time.perf_counter() - began)
        print(f"{path.name}  {span:,} positions, {speed:,.0f} img/s, {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    found = world.gather_object(lost)
    if world.main:
        names = sorted({name for each in found for name in each})
        worst = {name: max(each.get(name, 0.0) for each in found) for name in names}
        print(f"{len(firsts)} shards of {span:,} positions in {folder}")
        for name, value in worst.items():
            print(f"  {name}: storing lost at most {value:.2e} {asked.units.get(name, asked.units[''])}")


def write_shard(path: Path, first: int, asked: Asked) -> dict[str, float]:
    """Write one shard whole; returns the largest loss of each entry."""
    worst: dict[str, float] = {}
    blocks = asked.of(first)
    with ShardWriter(path) as writer:
        for place in range(first, first + asked.span, asked.size):
            keys, answer = next(blocks)
            arrays = asked.packed(answer)
            lost = asked.apart(answer, {name: torch.from_numpy(array) for name, array in arrays.items()})
            store.write_block(writer, place, keys, arrays, lost)
            worst = {name: max(worst.get(name, 0.0), value) for name, value in lost.items()}
    return worst


def audit(asked: Asked, seed: int, count: int) -> int:
    """Make ``count`` of the stored blocks anew; prints how far each is off and returns 1 if one is too far."""
    folder, span = Path(asked.cfg.folder), asked.span
    stored = store.Stored(folder, asked.size, span, torch.device("cpu"))
    shards = sorted(int(path.stem.removeprefix("positions-")) for path in folder.glob("positions-*.tar"))
    places = [first + block * asked.size for first in shards for block in range(span // asked.size)]
    # Which ones depends on the store's own size, so a repeated audit of a grown store looks elsewhere.
    order = sorted(places, key=lambda place: mix(seed, purpose("audit"), len(places), place))
    wrong = 0
    for place in order[:count]:
        keys, answer = next(asked.of(place))
        bound = stored.shard(place // span * span).errors(place % span // asked.size)
        try:
            kept = stored.rows(torch.arange(place, place + asked.size), keys)
        except store.Missing as reason:
            print(f"position {place:,}: {reason}")
            wrong += 1
            continue
        off = asked.apart(answer, kept)
        bad = [name for name in off if off[name] > bound[name] + SLACK]
        wrong += bool(bad)
        numbers = ", ".join(f"{name} {value:.2e} (stored with {bound[name]:.2e})" for name, value in off.items())
        print(f"position {place:,}: {'WRONG ' + ', '.join(bad) if bad else 'as stored'}; off by {numbers}")
    print(f"{min(count, len(places))} of {len(places)} blocks looked at, {wrong} wrong")
    return 1 if wrong else 0
