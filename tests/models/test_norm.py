"""Batch norm over several ranks: the channels stay in the last axis, names and tensors stay as they are."""

import pytest
import torch
from torch import nn

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.models.norm import BatchNorm, SyncBatchNorm, synchronise


def trunk() -> ViT:
    """A small trunk whose stem's statistics are not the initial ones."""
    torch.manual_seed(0)
    made = ViT(Model(width=32, depth=1, heads=2, patch=16, stem="hmlp", stem_norm="batch"), 32)
    made(torch.randn(4, 3, 32, 32) * 2 + 1)
    return made


@pytest.mark.parametrize("training", [False, True])
def test_a_synchronised_trunk_computes_the_same_on_one_rank(training):
    plain, converted = trunk().train(training), synchronise(trunk().train(training))
    assert sum(isinstance(module, SyncBatchNorm) for module in converted.modules()) > 0
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


def test_other_batch_norms_become_torchs_own_and_nothing_is_converted_twice():
    student = nn.Sequential(nn.BatchNorm1d(4), BatchNorm(4), nn.Linear(4, 4))
    once = list(synchronise(student))
    assert [type(module) for module in once] == [nn.SyncBatchNorm, SyncBatchNorm, nn.Linear]
    assert list(synchronise(student)) == once
