"""Groups of blocks that share weights, of one size or of several: the same network with tied weights."""

import pytest
import torch

from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.legality import check_visible_only
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load

SIZES = {"width": 16, "depth": 5, "heads": 2, "patch": 8}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def made(**options):
    torch.manual_seed(0)
    trunk = ViT(Model(**(SIZES | options)), 16)
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.3)
    return trunk.eval()


def test_equal_groups_are_share():
    one, other = made(depth=6, share=2), made(depth=6, groups=[2, 2, 2])
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one(IMAGE), other(IMAGE))
    assert one.groups == other.groups == (2, 2, 2)


def test_groups_are_an_unshared_trunk_whose_blocks_have_equal_weights():
    shared, plain = made(groups=[1, 3, 1], layer_scale=0.5), made(layer_scale=0.5)
    group_of, place_of = [0, 1, 1, 1, 2], [0, 0, 1, 2, 0]
    state = shared.state_dict()
    for name in plain.state_dict():
        if not name.startswith("blocks."):
            continue
        block, _, part = name.removeprefix("blocks.").partition(".")
        stem = f"blocks.{group_of[int(block)]}."
        own = part.replace(".", f".{place_of[int(block)]}.", 1)  # norms and scales of a repetition
        state[name + "?"] = state[stem + part] if stem + part in state else state[stem + own]
    blocks = {name[:-1]: value for name, value in state.items() if name.endswith("?")}
    rest = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    plain.load_state_dict(blocks | rest)
    torch.testing.assert_close(shared(IMAGE), plain(IMAGE))
    ours, theirs = (trunk.trace(IMAGE, layers=range(5), qkv=range(5)) for trunk in (shared, plain))
    for block in range(5):
        torch.testing.assert_close(ours.layers[block], theirs.layers[block])
        torch.testing.assert_close(ours.qkv[block], theirs.qkv[block])
    assert shared.flops() == plain.flops()
    assert len(shared.blocks) == 3


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"groups": [2, 2]}, "model.groups"),
        ({"groups": [5, 0]}, "model.groups"),
        ({"groups": [2, 3], "share": 5}, "model.share"),
        ({"share": 2}, "model.share"),
        ({"groups": [2, 3], "parallel": 2}, "model.groups"),
        ({"groups": [2, 3], "peg": 1}, "model.peg"),
    ],
)
def test_what_does_not_come_out_even_or_cannot_share_is_refused(options, key):
    with pytest.raises(ConfigError) as refused:
        made(**options)
    assert refused.value.key == key


def test_groups_are_an_option():
    model = load(Pretrain, None, ["model.depth=5", "model.groups=[1,3,1]"]).model
    assert model.groups == [1, 3, 1]
    check_visible_only(model)
