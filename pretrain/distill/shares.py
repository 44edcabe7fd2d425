"""How strongly each term of the loss pulls: gradient norms of the terms beside each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfseen.engines import Engine
from halfseen.monitor import Monitor


class GradientShares:
    """Logs gradient/TERM and gradient_share/TERM when called; always of one batch, so that curves are comparable.

    Shares are of the sum of norms. Terms that pull against each other have norms that sum to more than the whole
    gradient's.
    """

    def __init__(self, terms: Sequence[str], first: Callable[[], dict[str, Any]]) -> None:
        """terms: scalars of the student. first: this rank's first prepared micro-batch; called once."""
        self.terms, self.first = terms, first
        self.batch: dict[str, Any] | None = None

    def __call__(self, engine: Engine, monitor: Monitor, position: int) -> None:
        """Collective."""
        if self.batch is None:
            self.batch = self.first()
        monitor.scalars(position, curves(engine.norms(self.batch, self.terms)))


def curves(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms and their shares, under the terms' names without loss_; waits for the device."""
    names = [name.removeprefix("loss_") for name in norms]
    values = torch.stack(list(norms.values()))
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    found = {f"gradient/{name}": value for name, value in zip(names, values.tolist())}
    return found | {f"gradient_share/{name}": value for name, value in zip(names, shares.tolist())}
