"""A rank's stretch of a flattened tensor, as engines that shard by counting numbers hold it."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Stretch(Tensor):
    """Where some numbers lie in a tensor: has the tensor's shape, holds ``numbers`` alone, and computes nothing.

    What a DTensor is for cuts along an axis. A checkpoint writes and fills ``numbers`` in place, as the rectangles that
    they are of the tensor: no rank hears of another's, whatever the shape.
    """

    numbers: Tensor  # [count], any dtype; count may be 0
    start: int  # number of the first one in the flattened tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, shape: torch.Size, start: int) -> "Stretch":
        """numbers: contiguous, of any shape, and shared; shape: the whole tensor's."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=numbers.dtype, device=numbers.device)
        assert isinstance(made, Stretch)
        made.numbers, made.start = numbers.detach().view(-1), start
        return made

    @classmethod
    def nth(cls, padded: Tensor, shape: torch.Size, rank: int) -> "Stretch":
        """Stretch number ``rank`` of equally long ones, of which the last run over the tensor's end."""
        padded = padded.detach().view(-1)
        start = min(rank * padded.numel(), shape.numel())
        return cls(padded[: shape.numel() - start], shape, start)

    def fill(self, given: Tensor) -> None:
        """Copy this stretch's numbers from the whole tensor, or from a stretch that begins and ends alike."""
        if isinstance(given, Stretch):
            if (given.start, given.numbers.shape) != (self.start, self.numbers.shape):
                raise ValueError(f"{given} is another stretch than {self}")
            self.numbers.copy_(given.numbers)
        else:
            self.numbers.copy_(given.detach().reshape(-1)[self.start :][: self.numbers.numel()])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Which numbers of which shape."""
        return f"Stretch({self.start} to {self.start + self.numbers.numel()} of {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares an instance's, and calls the class's
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: a rank has a part of the operand."""
        raise TypeError(f"{func} of a Stretch, which is a place in a checkpoint: use its numbers")

    # What torch's distributed checkpoint asks a tensor that is more than one rank's.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in rectangles(self.shape, self.start, self.numbers.numel())
        ]

    def __create_write_items__(self, key: str, value: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.numbers)
        return [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        at = 0
        for chunk in self.__create_chunk_list__():
            count = chunk.sizes.numel()
            if chunk.offsets == index.offset:
                return self.numbers[at : at + count].view(chunk.sizes)
            at += count
        raise ValueError(f"nothing of {self} begins at {index.offset}")


def rectangles(shape: tuple[int, ...], start: int, count: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the rectangles that numbers start to start + count of a tensor are, in memory's order.

    A matrix has at most three: the end of a row, whole rows, the beginning of a row.
    """
    if not shape:
        yield from [((), ())] * count
        return
    row = math.prod(shape[1:])
    while count:
        first, within = divmod(start, row)
        taken = min(count, row - within) if within or count < row else count // row * row
        if taken < row:
            for offsets, sizes in rectangles(shape[1:], within, taken):
                yield (first, *offsets), (1, *sizes)
        else:
            yield (first, *(0 for _ in shape[1:])), (taken // row, *shape[1:])
        start, count = start + taken, count - taken
