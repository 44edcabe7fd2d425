"""Blocks: parallel branches, shared weights, drop path."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from halfseen.models.block import SKIP_FROM, Block, ParallelBlock, add_branch
from halfseen.models.norm import BatchNorm, LayerScale

WIDTH, HEADS, HIDDEN = 16, 2, 32


def scrambled(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def parallel_from(block, branches):
    """A parallel block whose first branches are the block's."""
    parallel = ParallelBlock(WIDTH, HEADS, HIDDEN, branches, layer_scale=0.5)
    own = block.state_dict()
    names = {"norm1": "attns.0.norm", "attn": "attns.0.attn", "ls1": "attns.0.ls"}
    names |= {"norm2": "ffns.0.norm", "mlp": "ffns.0.mlp", "ls2": "ffns.0.ls"}
    moved = {f"{names[key.split('.')[0]]}.{key.split('.', 1)[1]}": value for key, value in own.items()}
    missing, unexpected = parallel.load_state_dict(moved, strict=False)
    assert not unexpected
    assert all(".1." in name for name in missing)
    return parallel


def test_one_parallel_branch_is_the_ordinary_block():
    block = scrambled(Block(WIDTH, HEADS, HIDDEN, layer_scale=0.5))
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(parallel_from(block, 1)(x), block(x))


def test_a_zeroed_second_branch_changes_nothing():
    block = scrambled(Block(WIDTH, HEADS, HIDDEN, layer_scale=0.5))
    parallel = parallel_from(block, 2)
    x = torch.randn(2, 5, WIDTH)
    assert not torch.allclose(parallel(x), block(x))
    for branch in (parallel.attns[1], parallel.ffns[1]):
        nn.init.zeros_(branch.ls.gamma)
    torch.testing.assert_close(parallel(x), block(x))


def test_parallel_branches_read_the_same_input():
    parallel = scrambled(ParallelBlock(WIDTH, HEADS, HIDDEN, 2))
    x = torch.randn(2, 5, WIDTH)
    middle = x + sum(branch(x) for branch in parallel.attns)
    torch.testing.assert_close(parallel(x), middle + sum(branch(middle) for branch in parallel.ffns))


def test_a_parallel_block_has_no_repetitions():
    with pytest.raises(ValueError, match="repetition"):
        ParallelBlock(WIDTH, HEADS, HIDDEN, 2)(torch.randn(1, 2, WIDTH), 1)


def test_the_last_tokens_alone_are_the_end_of_all():
    block = scrambled(Block(WIDTH, HEADS, HIDDEN, layer_scale=0.5))
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(block(x, 0, 2), block(x)[:, -2:])


@pytest.mark.parametrize("last", [None, 2, 5])
def test_rows_common_to_all_samples_change_nothing(last):
    block = scrambled(Block(WIDTH, HEADS, HIDDEN, layer_scale=0.5))
    index = torch.tensor([[0, 2, 2], [3, 1, 0]])
    gradients, outputs = [], []
    for shared in (False, True):
        torch.manual_seed(0)
        rows = torch.randn(4, WIDTH, requires_grad=True)
        own = torch.randn(2, 4, WIDTH, requires_grad=True)
        x = torch.cat([own, rows[index]], dim=1)
        out = block(x, 0, last, (rows, index) if shared else None)
        block.zero_grad()
        out.square().sum().backward()
        gradients.append([rows.grad, own.grad, *(parameter.grad for parameter in block.parameters())])
        outputs.append(out.detach())
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_common_rows_and_drop_path_exclude_each_other():
    block = Block(WIDTH, HEADS, HIDDEN, rates=(0.5,)).train()
    with pytest.raises(ValueError, match="drop_path"):
        block(torch.randn(1, 3, WIDTH), common=(torch.randn(2, WIDTH), torch.tensor([[0]])))


def untied_copies(shared):
    """Two ordinary blocks that hold what each repetition uses."""
    copies = []
    for repetition in range(2):
        copy = Block(WIDTH, HEADS, HIDDEN, layer_scale=0.5)
        state = {}
        for name, value in shared.state_dict().items():
            module, rest = name.split(".", 1)
            if module in ("norm1", "ls1", "norm2", "ls2"):
                number, rest = rest.split(".", 1)
                if int(number) != repetition:
                    continue
            state[f"{module}.{rest}"] = value
        copy.load_state_dict(state)
        copies.append(copy)
    return copies


def test_a_shared_gradient_is_the_sum_over_untied_copies():
    shared = scrambled(Block(WIDTH, HEADS, HIDDEN, rates=(0.0, 0.0), layer_scale=0.5))
    first, second = untied_copies(shared)
    x = torch.randn(2, 5, WIDTH)
    out = shared(shared(x, 0), 1)
    expected = second(first(x))
    torch.testing.assert_close(out, expected)
    assert torch.equal(shared(x), out)  # one call for all repetitions
    out.square().sum().backward()
    expected.square().sum().backward()
    for name in ("attn.qkv.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc2.bias"):
        total = first.get_parameter(name).grad + second.get_parameter(name).grad
        torch.testing.assert_close(shared.get_parameter(name).grad, total)
    for number, copy in enumerate((first, second)):
        for name in ("norm1", "norm2"):
            own = shared.get_submodule(f"{name}.{number}").weight.grad
            torch.testing.assert_close(own, copy.get_submodule(name).weight.grad)


def test_an_unshared_block_has_plain_names():
    assert "norm1.weight" in Block(WIDTH, HEADS, HIDDEN).state_dict()
    assert "norm1.1.weight" in Block(WIDTH, HEADS, HIDDEN, rates=(0.0, 0.0)).state_dict()


@pytest.mark.parametrize("rate", [SKIP_FROM / 2, 0.3])
def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    x = torch.zeros(4000, 2, 3)
    change = add_branch(x, x, lambda kept: kept + 1.0, rate)
    per_sample = change.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    dropped = (per_sample[:, 0] == 0).double().mean().item()
    assert dropped == pytest.approx(rate, abs=4 * math.sqrt(rate / 4000))
    kept = per_sample[per_sample[:, 0] != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    assert per_sample.mean().item() == pytest.approx(1.0, abs=0.05)


def test_both_forms_of_drop_path_draw_independent_samples():
    # The variance of the number dropped tells independent draws (n p q) from a fixed count (0).
    for rate in (SKIP_FROM / 2, 0.3):
        torch.manual_seed(0)
        x = torch.zeros(20, 1, 1)
        counts = [(add_branch(x, x, lambda kept: kept + 1.0, rate) == 0).sum().item() for _ in range(1500)]
        spread = torch.tensor(counts, dtype=torch.float64)
        assert spread.mean().item() == pytest.approx(20 * rate, rel=0.1)
        assert spread.var().item() == pytest.approx(20 * rate * (1 - rate), rel=0.15)


def test_dropped_samples_are_not_computed():
    torch.manual_seed(0)
    seen = []
    x = torch.zeros(100, 1, 1)
    change = add_branch(x, x, lambda kept: seen.append(len(kept)) or kept + 1.0, 0.5)
    assert seen == [(change != 0).sum().item()]
    assert 20 < seen[0] < 80


def test_all_dropped_still_gives_every_parameter_a_gradient():
    block = scrambled(Block(WIDTH, HEADS, HIDDEN, rates=(0.99,))).train()
    torch.manual_seed(0)
    x = torch.randn(1, 3, WIDTH)
    out = block(x)
    assert torch.equal(out, x)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_drop_path_is_off_in_evaluation():
    block = scrambled(Block(WIDTH, HEADS, HIDDEN, rates=(0.9,))).eval()
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(block(x), block(x))


def test_layer_scale_starts_at_its_value():
    scale = LayerScale(3, 0.1)
    torch.testing.assert_close(scale(torch.ones(2, 3)), torch.full((2, 3), 0.1))


def test_batch_norm_takes_statistics_over_all_but_channels():
    ours, theirs = BatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 5, 6, 4) * 3 + 1
    torch.testing.assert_close(ours(x).permute(0, 3, 1, 2), theirs(x.permute(0, 3, 1, 2)))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_blocks_of_different_drop_path_rates_are_compiled_once():
    """One compilation for a rate of 0, one for all others: torch gives up on code that it has compiled eight times."""
    torch._dynamo.reset()
    compilations = CompileCounter()
    blocks = [Block(8, 2, 16, rates=(0.03 * number,)).train() for number in range(10)]
    x = torch.randn(3, 4, 8, requires_grad=True)
    for block in blocks:
        block.compile(backend=compilations)
        x = block(x, 0)
    assert compilations.frame_count == 2
