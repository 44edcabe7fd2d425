"""Batch norm over several ranks: the channels stay in the last axis, names and tensors stay as they are."""

import pytest
import ranks
import torch
from torch import nn

from halfseen.config import Model
from halfseen.distributed import World
from halfseen.models import ViT
from halfseen.models.norm import BatchNorm, SummedBatchNorm, SummedBatchNormOfMaps, SyncBatchNorm, synchronise


def trunk() -> ViT:
    """A small trunk whose stem's statistics are not the initial ones."""
    torch.manual_seed(0)
    made = ViT(Model(width=32, depth=1, heads=2, patch=16, stem="hmlp", stem_norm="batch"), 32)
    made(torch.randn(4, 3, 32, 32) * 2 + 1)
    return made


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_synchronised_trunk_computes_the_same_on_one_rank(training, cpu):
    plain, converted = trunk().train(training), synchronise(trunk().train(training), cpu)
    kind = SummedBatchNorm if cpu else SyncBatchNorm
    assert sum(isinstance(module, kind) for module in converted.modules()) > 0
    assert not any(isinstance(module, BatchNorm) for module in converted.modules())
    image = torch.randn(3, 3, 32, 32)
    assert torch.equal(converted(image), plain(image))
    assert list(converted.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name


def test_conversion_keeps_parameters_and_mode():
    student = trunk().eval()
    before = dict(student.named_parameters())
    synchronise(student)
    assert all(parameter is before[name] for name, parameter in student.named_parameters())
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize(
    ("cpu", "kinds"),
    [(False, [nn.SyncBatchNorm, SyncBatchNorm]), (True, [SummedBatchNormOfMaps, SummedBatchNorm])],
)
def test_other_batch_norms_keep_the_second_axis_for_channels_and_nothing_is_converted_twice(cpu, kinds):
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 5, 5)
    plain = nn.BatchNorm2d(4)
    student = nn.Sequential(nn.BatchNorm2d(4), BatchNorm(4), nn.Linear(4, 4))
    once = list(synchronise(student, cpu))
    assert [type(module) for module in once] == [*kinds, nn.Linear]
    assert list(synchronise(student, cpu)) == once
    torch.testing.assert_close(once[0](maps), plain(maps))


def uneven(world, shape):
    """What a norm over all ranks makes of a share of one batch: output, gradients and statistics."""
    torch.manual_seed(0)
    whole = torch.randn(6, *shape) * 3 + 100  # far from 0: sums of squares alone would lose digits
    norm = nn.BatchNorm2d(shape[0]) if len(shape) == 3 else BatchNorm(shape[-1])
    student = nn.Sequential(norm)
    nn.init.uniform_(norm.weight)
    if world.world > 1:
        synchronise(student, cpu=True)
    image = whole.split([4, 2])[world.rank] if world.world > 1 else whole
    image = image.clone().requires_grad_()
    out = student(image)
    (out.square() * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape)).sum().backward()
    state = {name: value.clone() for name, value in student.state_dict().items()}
    return out.detach(), image.grad, student[0].weight.grad, state


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 5)])
def test_cpu_ranks_with_unequal_shares_have_the_statistics_and_gradients_of_one(shape):
    one, (first, second) = uneven(World(), shape), ranks.run(uneven, 2, shape)
    for number in (0, 1):
        torch.testing.assert_close(torch.cat([first[number], second[number]]), one[number], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[2] + second[2], one[2], rtol=1e-4, atol=1e-4)
    for name, value in one[3].items():
        torch.testing.assert_close(first[3][name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[3][name], second[3][name])
