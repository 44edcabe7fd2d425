"""Tensors of which a rank holds a part, whatever cut them: a DTensor, or a Stretch of a flattened one."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from halfseen.checkpoint.stretch import Stretch
from halfseen.distributed import World


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; the tensor itself where it is whole. Without gradients."""
    if isinstance(tensor, Stretch):
        return tensor.numbers
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # here to_local is a mere attribute; detaching a DTensor costs a dispatch
        return tensor.to_local()


def whole(tensor: Tensor, world: World) -> Tensor:
    """The tensor with every rank's part, on all of them. Collective where it has parts."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not isinstance(tensor, Stretch):
        return tensor
    found = torch.zeros(tensor.shape, dtype=tensor.dtype, device=world.device)
    found.view(-1)[tensor.start :][: tensor.numbers.numel()] = tensor.numbers
    return world.sum(found)


def fill(own: Tensor, given: Tensor) -> None:
    """Copy given, whole or cut as own is, into this rank's part of own. Collective for a DTensor into a Stretch."""
    if isinstance(own, Stretch):
        own.fill(given.full_tensor() if isinstance(given, DTensor) else given)
    elif isinstance(own, DTensor) and not isinstance(given, DTensor):
        own.copy_(distribute_tensor(given.to(own.device), own.device_mesh, own.placements, src_data_rank=None))
    else:
        own.copy_(given)
