"""Attention over maps: what each place sees, what stands outside of the map, windows; AlterNet's order of blocks."""

import itertools

import pytest
import torch

from halfseen.config import ConfigError
from halfseen.models.alternet import DEPTHS, AlterNet, AlterNetConfig, AttentionBlock, pattern
from halfseen.models.convolutional import Attention2d, ConvAttention2d, LocalAttention


def changed(module, size, place):
    """Places of the result that move when one place of the map does."""
    torch.manual_seed(0)
    x = torch.randn(1, *size, 8)
    other = x.clone()
    other[0, place[0], place[1]] += 1.0
    moved = (module(x)[0] != module(other)[0]).any(-1)[0]
    return {tuple(where) for where in moved.nonzero().tolist()}


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 1), (1, 1)])
def test_a_place_sees_its_window_and_nothing_else(kernel, dilation):
    steps = [dilation * step for step in range(-(kernel // 2), kernel // 2 + 1)]
    near = {(4 + down, 5 + across) for down in steps for across in steps}
    inside = {(y, x) for y, x in near if 0 <= y < 9 and 0 <= x < 9}
    assert changed(ConvAttention2d(8, 2, 4, kernel=kernel, dilation=dilation), (9, 9), (4, 5)) == inside


def test_outside_of_the_map_gets_no_weight_or_as_published_that_of_score_zero():
    torch.manual_seed(0)
    masked, zero = (ConvAttention2d(8, 2, 4, padding=padding) for padding in ("masked", "zero"))
    zero.load_state_dict(masked.state_dict())
    x = torch.randn(2, 5, 6, 8)
    corner = [0, 1, 2, 3, 6]  # of the window around the first place these lie outside
    assert not masked(x)[1][:, :, 0, corner].any()
    assert (zero(x)[1][:, :, 0, corner] > 0).all()
    inner = [y * 6 + x for y in range(1, 4) for x in range(1, 5)]
    torch.testing.assert_close(masked(x)[1][:, :, inner], zero(x)[1][:, :, inner])
    torch.testing.assert_close(masked(x)[1].sum(-1), torch.ones(2, 2, 30))


def test_a_window_over_the_whole_map_is_global_attention():
    torch.manual_seed(0)
    local, everywhere = ConvAttention2d(8, 2, 4, kernel=7), Attention2d(8, 2, 4)
    everywhere.load_state_dict(local.state_dict())
    x = torch.randn(2, 4, 3, 8)
    torch.testing.assert_close(local(x)[0], everywhere(x)[0], rtol=1e-4, atol=1e-6)


def test_an_even_kernel_looks_around_its_place_where_dilation_is_even():
    around = {(y, x) for y in (3, 5) for x in (4, 6)} | {(4, 5)}  # itself by its query alone
    assert changed(ConvAttention2d(8, 2, 4, kernel=2, dilation=2), (9, 9), (4, 5)) == around


def test_an_even_kernel_has_no_centre():
    with pytest.raises(ValueError, match="odd"):
        ConvAttention2d(8, 2, 4, kernel=4)


def test_strided_keys_are_fewer_and_a_mask_closes_them():
    module, x = Attention2d(8, 2, 4, out=6, stride=2), torch.randn(2, 4, 6, 8)
    out, weights = module(x)
    assert out.shape == (2, 4, 6, 6)
    assert weights.shape == (2, 2, 24, 6)
    mask = torch.zeros(24, 6)
    mask[:, 0] = float("-inf")
    assert not module(x, mask)[1][..., 0].any()


def test_windows_do_not_look_at_each_other():
    assert changed(LocalAttention(8, 2, 4, window=3), (6, 9), (4, 5)) == {
        (y, x) for y in range(3, 6) for x in range(3, 6)
    }
    with pytest.raises(ValueError, match="tile"):
        LocalAttention(8, 2, 4, window=4)(torch.randn(1, 6, 8, 8))


def test_the_table_of_windows_is_indexed_by_key_minus_query():
    module = LocalAttention(8, 1, 4, window=2)
    torch.nn.init.zeros_(module.attn.q.weight)  # all scores are the table's
    with torch.no_grad():
        module.pos_embedding.copy_(torch.arange(9.0).view(3, 3))
    scores = module(torch.randn(1, 2, 2, 8))[1].log()[0, 0]
    # From place 0 = (0, 0) to place 3 = (1, 1) the offset is (1, 1), row 2 and column 2 of the table.
    assert (scores[0, 3] - scores[0, 0]).item() == pytest.approx(8 - 4, abs=1e-4)
    assert (scores[3, 0] - scores[3, 3]).item() == pytest.approx(0 - 4, abs=1e-4)


@pytest.mark.parametrize(("depth", "blocks"), [("18", 8), ("34", 17), ("50", 17)])
def test_alternet_s_stages_end_in_attention(depth, blocks):
    with torch.device("meta"):
        model = AlterNet(AlterNetConfig(depth), 224)
    attends = [isinstance(block, AttentionBlock) for block in model.blocks]
    assert len(attends) == blocks
    assert sum(attends) == sum(DEPTHS[depth].attention)
    assert attends[-1]
    assert not any(first and second for first, second in itertools.pairwise(attends))


def test_alternating_blocks_end_with_attention_after_each_convolution():
    assert pattern(6, 2) == [False, False, False, True, False, True]
    with pytest.raises(ValueError, match="cannot be attention"):
        pattern(3, 2)


def test_alternet_trains_and_refuses_sizes_its_windows_do_not_tile():
    model = AlterNet(AlterNetConfig("18", window=2, head_width=8, drop_path=0.5), 64).train()
    tokens = model(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, 2 * 2, 512)
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ConfigError, match="multiple of 224"):
        AlterNet(AlterNetConfig("18"), 256)
