"""Relative position bias: rows, places in the table, visible tokens, and moving a table to another grid."""

import pytest
import torch
from timm.layers import gen_relative_position_index
from torch import nn

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.models.general import GeneralAttention, Parts
from halfseen.models.places import Places
from halfseen.models.relative import (
    RelativeBias,
    geometric,
    relative_index,
    relative_rows,
    resize_relative,
    spline,
    whole,
)

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 16}
IMAGE = (48, 64)


def build(**options):
    torch.manual_seed(0)
    vit = ViT(Model(**(SMALL | options)), IMAGE).eval()
    for name, parameter in vit.named_parameters():
        if name.endswith(("bias_table", "q_bias", "v_bias")):
            nn.init.normal_(parameter)
    return vit


@pytest.mark.parametrize("grid", [(3, 4), (5, 2), (1, 1)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_pairs_have_the_rows_that_timm_and_beit_give_them(grid, prefix):
    assert torch.equal(relative_index(grid, prefix), gen_relative_position_index(grid, class_token=bool(prefix)))
    assert relative_index(grid, prefix).max() == relative_rows(grid, prefix) - 1


def test_all_prefix_tokens_share_the_three_last_rows():
    index, rows = relative_index((2, 3), 2), relative_rows((2, 3), 2)
    assert (index[:2, 2:] == rows - 3).all()
    assert (index[2:, :2] == rows - 2).all()
    assert (index[:2, :2] == rows - 1).all()


def test_the_bias_is_added_to_the_scaled_scores():
    torch.manual_seed(0)
    module = GeneralAttention(24, 3, parts=Parts(key_bias=False, relative=((2, 3), 1)))
    for parameter in (module.relative_position_bias_table, module.q_bias, module.v_bias):
        nn.init.normal_(parameter)
    x, shared = torch.randn(2, 7, 24), torch.randn(1, 3, 7, 7)
    bias = torch.cat([module.q_bias, torch.zeros(24), module.v_bias])
    q, k, v = (x @ module.qkv.weight.T + bias).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    own = module.relative_position_bias_table[relative_index((2, 3), 1)].permute(2, 0, 1)
    weights = (q @ k.mT / 8**0.5 + own + shared).softmax(-1)
    expected = module.proj((weights @ v).transpose(1, 2).reshape(2, 7, 24))
    torch.testing.assert_close(module(x, places=Places(bias=shared)), expected, rtol=1e-4, atol=1e-5)


def test_the_cpu_s_bfloat16_path_adds_the_bias_too():
    module = GeneralAttention(24, 3, parts=Parts(relative=((2, 3), 1)))
    nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, 7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)
    torch.testing.assert_close(low.float(), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_a_table_at_zero_changes_nothing_and_a_trained_one_does(relative):
    vit, plain = build(relative=relative), build()
    plain.load_state_dict(vit.state_dict(), strict=False)
    image = torch.randn(2, 3, *IMAGE)
    assert not torch.allclose(vit(image), plain(image))
    for name, parameter in vit.named_parameters():
        if name.endswith("bias_table"):
            nn.init.zeros_(parameter)
    torch.testing.assert_close(vit(image), plain(image))


@pytest.mark.parametrize("options", [{"class_token": True}, {"class_token": False}, {"registers": 2}])
@pytest.mark.parametrize("relative", ["shared", "block"])
def test_visible_tokens_keep_the_bias_of_their_places(relative, options):
    # Hidden tokens that nobody attends to are no tokens: push their keys away and compare.
    vit = build(relative=relative, **options)
    image, index = torch.randn(2, 3, *IMAGE), torch.tensor([[0, 3, 7, 8], [1, 2, 10, 11]])
    kept = torch.cat([torch.arange(vit.prefix).expand(2, -1), index + vit.prefix], dim=1)
    far = torch.full((2, 1, 1, vit.prefix + 12), -1e9).scatter(3, kept[:, None, None], 0.0)
    x = vit.embed(image)
    bias = far if vit.rel_pos_bias is None else vit.rel_pos_bias() + far
    for block in vit.blocks:
        x = block(x, places=Places(bias=bias))
    whole_image = vit.norm(x).gather(1, kept[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(vit(image, index=index), whole_image, rtol=1e-4, atol=1e-5)


def test_drop_path_leaves_each_sample_its_own_places(monkeypatch):
    # Draws that keep every sample but would put them in another order.
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.linspace(0.9, 0.6, shape[0]).view(shape))
    vit = build(relative="shared", drop_path=0.5, drop_path_shape="constant").train()
    image, index = torch.randn(3, 3, *IMAGE), torch.tensor([[0, 3, 7], [1, 2, 10], [4, 8, 11]])
    alone = [vit(image[number : number + 1], index=index[number : number + 1]) for number in range(3)]
    torch.testing.assert_close(vit(image, index=index), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_index_buffers_are_not_saved(relative):
    vit = build(relative=relative)
    assert not any(name.endswith("index") for name in vit.state_dict())
    assert RelativeBias(2, (2, 2), 1).relative_position_bias_table.count_nonzero() == 0


# ------------------------------------------------------------------------------------------- moving to another grid


def test_an_equal_grid_is_the_very_same_table():
    table = torch.randn(relative_rows((3, 4), 1), 2)
    assert resize_relative(table, (3, 4), (3, 4)) is table


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((4, 4), (3, 6)), ((6, 3), (4, 5)), ((1, 5), (4, 2))])
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_table_moves_to_any_grid_and_keeps_its_prefix_rows_and_centre(old, new, prefix):
    table = torch.randn(relative_rows(old, prefix), 2)
    moved = resize_relative(table, old, new)
    assert moved.shape == (relative_rows(new, prefix), 2)
    assert torch.equal(moved[relative_rows(new, 0) :], table[relative_rows(old, 0) :])
    torch.testing.assert_close(moved[relative_rows(new, 0) // 2], table[relative_rows(old, 0) // 2])


def test_axes_move_on_their_own():
    table = torch.randn(relative_rows((3, 5), 0), 2)
    at_once = resize_relative(table, (3, 5), (6, 4))
    one_by_one = resize_relative(resize_relative(table, (3, 5), (3, 4)), (3, 4), (6, 4))
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5)


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="not of a grid"):
        resize_relative(torch.randn(50, 2), (3, 3), (4, 4))


def test_geometric_places_span_the_new_offsets():
    places = geometric(27, 47)
    steps = places.diff()[13:]
    torch.testing.assert_close(steps[1:] / steps[:-1], torch.full((12,), 1.0903074).double(), rtol=1e-5, atol=0)
    assert places[-1].item() == pytest.approx(23, abs=1e-3)
    assert torch.equal(places, -places.flip(0))


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_a_spline_is_exact_for_polynomials_of_its_degree(count):
    places, asked = geometric(9, 13)[:count], torch.linspace(-9, 9, 40).double()
    asked = asked[(asked >= places[0]) & (asked <= places[-1])]

    def polynomial(at):
        return sum((2 - power) * at**power for power in range(min(3, count - 1) + 1))

    torch.testing.assert_close(spline(places, asked) @ polynomial(places), polynomial(asked))


def test_a_spline_keeps_the_end_values_outside():
    places = geometric(9, 13)
    beyond = spline(places, torch.tensor([-99.0, 99.0]).double())
    torch.testing.assert_close(beyond, torch.eye(9).double()[[0, -1]])
    assert torch.equal(whole(5), torch.arange(-2.0, 3.0).double())
