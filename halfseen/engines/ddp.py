"""DistributedDataParallel: every rank holds the whole student, gradients are averaged."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from halfseen.distributed import one_process_group

from .base import Engine

# Only BatchNorm changes buffers in the forward, and it is synchronised: broadcasting them would be waste.
# Newer versions of torch renamed the option.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class Replicated(Engine):
    """DDP around the student, without static_graph (which breaks together with no_sync)."""

    name = "ddp"

    def place(self, student: nn.Module) -> nn.Module:
        """Wrap the student; rank 0's weights go to every rank."""
        one_process_group(self.world)
        device = self.world.device
        return DistributedDataParallel(
            student.to(device),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **cast(dict[str, Any], {SYNC_BUFFERS: False}),
        )

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Average gradients over ranks in the last backward only."""
        if last:
            yield
        else:
            with self.module.no_sync():  # type: ignore[operator]
                yield

    def infer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The bare student: weights are whole here, so predicting needs no other rank."""
        return self.student(batch)
