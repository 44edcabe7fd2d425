"""Nearest-neighbour classification of features: exact, weighted, by blocks, so that a million rows fit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.config import ConfigError
from halfseen.distributed import World

from .evaluation import Prepare, Share, in_step

BLOCK = 1 << 16  # rows compared at once


def nearest(query: Tensor, bank: Tensor, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The k rows of bank [M, D] most similar to each row of query [Q, D]: similarity [Q, k], row int64 [Q, k].

    Rows are unit vectors, so the product is the cosine. Exact: blocks of the bank are compared in turn and the best so
    far are kept; memory is Q x (block + k) numbers.
    """
    k = min(k, len(bank))
    best = query.new_full((len(query), 0), 0.0)
    rows = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
    for first in range(0, len(bank), block):
        similarity = query @ bank[first : first + block].T
        number = torch.arange(first, first + similarity.shape[1], device=query.device).expand(len(query), -1)
        best, place = torch.cat([best, similarity], dim=1).topk(min(k, best.shape[1] + similarity.shape[1]), dim=1)
        rows = torch.cat([rows, number], dim=1).gather(1, place)
    return best, rows


def vote(similarity: Tensor, label: Tensor, classes: int, temperature: float) -> Tensor:
    """Scores [Q, K] of k neighbours with similarity [Q, k] and label int64 [Q, k]: exp(similarity / temperature) each.

    Wu et al., 2018; DINO's protocol has temperature 0.07.
    """
    weight = (similarity / temperature).exp()
    return torch.zeros(len(label), classes, dtype=weight.dtype, device=weight.device).scatter_add_(1, label, weight)


def top1(
    bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, ks: Iterable[int], temperature: float
) -> dict[int, float]:
    """Accuracy of test features under bank features, both (unit [n, D], label int64 [n]), for several k in one pass."""
    ks = sorted(ks)
    hits = dict.fromkeys(ks, 0)
    for query, label in zip(test[0].split(1024), test[1].split(1024)):
        similarity, rows = nearest(query, bank[0], ks[-1])
        labels = bank[1][rows]
        for k in ks:
            named = vote(similarity[:, :k], labels[:, :k], classes, temperature).argmax(1)
            hits[k] += int((named == label).sum())
    return {k: count / len(test[1]) for k, count in hits.items()}


def features(
    predict: Callable[[dict[str, Any]], Tensor], batches: Iterable[dict[str, Any]], prepare: Prepare, world: World
) -> tuple[Tensor, Tensor]:
    """Unit features float32 [n, D] and labels int64 [n] of a whole set, on every rank. Collective.

    predict: prepared batch to features [B, D]. batches: this rank's share, from ``data.evaluation_batches``.
    """
    found, labels = [], []
    for batch, counts in in_step(Share(batches, prepare), world):
        value = predict(batch)
        if counts:
            found.append(F.normalize(value.float(), dim=1).cpu())
            labels.append(batch["label"].cpu())
    mine = (torch.cat(found), torch.cat(labels)) if found else None
    parts = [part for part in world.gather_object(mine) if part is not None]
    if not parts:
        raise ConfigError("data.val", "", "none of its images is usable", "see `halfseen shards check`")
    whole = (torch.cat([part[index] for part in parts]).to(world.device) for index in (0, 1))
    value, label = whole
    return value, label
