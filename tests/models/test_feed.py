"""A frozen MLP that recomputes: the same numbers, less kept, and refusals where a gradient would be lost."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from halfseen.models.block import Block, ParallelBlock
from halfseen.models.feed import Mlp, feed


def branch(train=False):
    torch.manual_seed(0)
    norm, mlp = nn.LayerNorm(16), Mlp(16, 64)
    nn.init.normal_(norm.weight)
    for module in (norm, mlp):
        module.requires_grad_(train)
    return norm, mlp


def kept(function, *arguments):
    """Bytes of distinct storage kept for the backward of what a function returns, weights left out; and that."""
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arguments)
    return sum(seen.values()), result


@pytest.mark.parametrize("kind", [None, torch.bfloat16])
def test_result_and_gradient_are_the_plain_ones_from_the_input_alone(kind):
    norm, mlp = branch()
    x = torch.randn(2, 5, 16, requires_grad=True)
    found = []
    for recompute in (False, True):
        mlp.recompute = recompute
        with torch.autocast("cpu", kind, enabled=kind is not None, cache_enabled=False):
            bytes_kept, result = kept(feed, x, norm, mlp)
        (gradient,) = torch.autograd.grad(result.float().square().sum(), x)
        found.append((bytes_kept, result.detach(), gradient))
    (much, plain, plain_gradient), (little, frugal, frugal_gradient) = found
    assert torch.equal(plain, frugal)
    torch.testing.assert_close(frugal_gradient, plain_gradient, rtol=1e-5 if kind is None else 2e-2, atol=1e-5)
    assert little == x.untyped_storage().nbytes()
    assert much >= 4 * little if kind is None else much > little


@pytest.mark.parametrize("make", [lambda: Block(16, 2, 64, layer_scale=0.1), lambda: ParallelBlock(16, 2, 64, 2)])
def test_every_kind_of_block_recomputes(make):
    torch.manual_seed(0)
    block = make()
    x = torch.randn(3, 5, 16, requires_grad=True)
    mlps = [module for module in block.modules() if isinstance(module, Mlp)]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(".attn." in f".{name}")
    results = []
    for recompute in (False, True):
        for mlp in mlps:
            mlp.recompute = recompute
        bytes_kept, result = kept(block, x)
        results.append(
            (bytes_kept, *torch.autograd.grad(result.square().sum(), [x, *filter(trains, block.parameters())]))
        )
    assert results[1][0] < 0.75 * results[0][0]
    for plain, frugal in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(frugal, plain, rtol=1e-4, atol=1e-5)


def trains(parameter):
    return parameter.requires_grad


def test_weights_that_train_are_refused_instead_of_left_without_a_gradient():
    norm, mlp = branch(train=True)
    mlp.recompute = True
    with pytest.raises(ValueError, match="would get no gradient"):
        feed(torch.randn(1, 2, 16, requires_grad=True), norm, mlp)


def test_without_a_backward_nothing_special_happens():
    norm, mlp = branch()
    x = torch.randn(1, 2, 16)
    mlp.recompute = True
    with torch.no_grad():
        assert torch.equal(feed(x, norm, mlp), mlp(norm(x)))
    assert not feed(x, norm, mlp).requires_grad
