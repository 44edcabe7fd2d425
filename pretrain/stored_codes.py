"""A tokenizer's codes on disk (see pretrain/store.py): BEiT's targets without its tokenizer.

The array of a block of positions is codes, int16 or int32 [positions, N]. They are the tokenizer's own,
every one.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfseen.config import Augment, ConfigError
from halfseen.data import ImageSet
from halfseen.distributed import World
from halfseen.teachers import digest_of

from . import store, targets
from .config import Pretrain
from .targets import Target
from .targets.codes import Codes, cross_entropy, drawn

KEY = "target.codes.store"


def span_of(config: Pretrain) -> int:
    """Positions in a shard."""
    return -(-config.target.codes.store.shard_images // store.BLOCK) * store.BLOCK


def describe(config: Pretrain, train_set: ImageSet) -> dict[str, Any]:
    """Everything the codes depend on, but for what only the tokenizer itself tells (see describe_tokenizer)."""
    cfg = config.target.codes
    described = {
        **store.views_of(config, train_set),
        **{f"target.codes.{name}": getattr(cfg, name) for name in ("tokenizer", "image_size", "heads", "precision")},
        "store.shard_images": span_of(config),
    }
    return json.loads(json.dumps(described))


def describe_tokenizer(codes: Codes) -> dict[str, Any]:
    """How many codes there are, and the digest of what chooses them."""
    return {"tokenizer.codes": codes.width, "tokenizer.digest": digest_of(codes.module)}


def live(config: Pretrain, device: torch.device) -> Codes:
    """The tokenizer itself. ConfigError for a run that has none."""
    if config.target.name != "codes":
        reason = "what is predicted is made of the image alone, or by the student's average"
        raise ConfigError("target.name", config.target.name, reason, "only a tokenizer's codes are stored")
    made = targets.create(config, device)
    assert isinstance(made, Codes)
    return made


def period_of(config: Pretrain, train_set: ImageSet) -> int | None:
    """After how many images the views of a run come again; None: never."""
    if config.target.name != "codes":
        return None
    return store.period_of(config, config.target.codes.store, KEY, train_set.images)


def packed(codes: Tensor, count: int) -> dict[str, np.ndarray]:
    """Codes int64 [B, N] of ``count`` as they are stored."""
    smallest = torch.int16 if count <= 2**15 else torch.int32
    return {"codes": codes.to(smallest).cpu().numpy()}


def open_target(config: Pretrain, train_set: ImageSet, total: int, world: World) -> Target:
    """The target of a run of ``total`` images: stored codes, where a store is named."""
    cfg = config.target.codes.store
    if config.target.name != "codes" or not cfg.folder:
        return targets.create(config, world.device)
    folder, described = Path(cfg.folder), describe(config, train_set)
    asked = None
    if cfg.missing == "live":
        asked = live(config, world.device)
        described |= describe_tokenizer(asked)
    store.refuse_other(folder, described, f"{KEY}.folder")
    width = int(store.described_in(folder, f"{KEY}.folder")["tokenizer.codes"])
    stored = store.Stored(folder, store.BLOCK, span_of(config), world.device)
    period = period_of(config, train_set)
    gaps = store.refuse_gaps(stored, min(total, period or total), cfg, KEY)
    if world.main:
        print(f"target    codes in {folder}" + (f", {len(gaps)} shards missing" if gaps else ""), flush=True)
    return StoredCodes(stored, width, config.patch, asked)


class StoredCodes:
    """Codes of a store; of the tokenizer, if there is one, where they are not in it.

    One of a family, see pretrain/targets. The batch must hold key and position, on the CPU.
    """

    def __init__(self, stored: store.Stored, width: int, patch: int, asked: Codes | None) -> None:
        self.stored, self.width, self.patch, self.asked = stored, width, patch, asked

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """int64 [B, N]."""
        try:
            return self.stored.rows(batch["position"], batch["key"])["codes"].long()
        except store.Missing as gap:
            if self.asked is None:
                fix = f"run `halfseen teach` again, or set {KEY}.missing=live"
                raise ConfigError(f"{KEY}.folder", str(self.stored.folder), str(gap), fix) from gap
            return self.asked(batch)

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """See cross_entropy."""
        return cross_entropy(prediction, target, weight)

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """See drawn."""
        return drawn(batch, prediction, self.patch, augment)


def apart(answer: Tensor, kept: Tensor) -> float:
    """Share of codes [B, N] that differ."""
    return (answer.cpu() != kept.long().cpu()).float().mean().item()
