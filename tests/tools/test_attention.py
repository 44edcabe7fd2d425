"""Attention pictures show the weights that the trunk really used."""

import pytest
import torch
from torchvision.io import encode_png, read_file, write_file

from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.tools.attention import main, maps, probabilities, rollout

SMALL = {"size": "ti", "width": 32, "depth": 3, "heads": 4, "patch": 8}
KINDS = [
    *({}, {"relative": "block", "key_bias": False}, {"relative": "shared"}, {"rope": True}, {"class_token": False}),
    *({"irpe": "product", "irpe_on": "qk"}, {"irpe": "cross", "share": 3}, {"head_mixing": "affine", "share": 3}),
    {"attention": "reattention"},
]


def make(**model):
    torch.manual_seed(0)
    trunk = ViT(Model(**{**SMALL, **model}), (24, 16)).eval()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk


@pytest.mark.parametrize("model", KINDS)
def test_values_weighted_by_what_is_drawn_are_what_the_attention_gives(model):
    trunk, image = make(**model), torch.randn(2, 3, 24, 16)
    attention, results = trunk.blocks[-1].attn, []
    attention.register_forward_hook(lambda module, given, result: results.append(result))
    projected = trunk.trace(image, qkv=[2]).qkv[2]
    weights = probabilities(trunk, image)[2]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for mixing in ("proj_w", "reattention"):  # what is drawn is the softmax; these come after it
        part = getattr(attention, mixing, None)
        part = part[-1] if isinstance(part, torch.nn.ModuleList) else part
        weights = weights if part is None else part(weights)
    value = projected[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)
    again = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, results[len(results) // 2 - 1], rtol=1e-4, atol=1e-4)


def test_a_parallel_block_has_the_heads_of_all_its_branches():
    trunk, image = make(parallel=2), torch.randn(2, 3, 24, 16)
    given = []
    for branch in trunk.blocks[1].attns:
        branch.attn.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    found = probabilities(trunk, image)
    assert len(found) == 3
    expected = [branch.attn.probabilities(x) for branch, x in zip(trunk.blocks[1].attns, given)]
    assert torch.equal(found[1], torch.cat(expected, dim=1))
    assert maps(trunk, image)[0].shape == (2, 8, 3, 2)


def test_maps_are_what_the_class_token_looks_at_on_the_grid():
    trunk, image = make(), torch.randn(2, 3, 24, 16)
    heads, spread = maps(trunk, image, block=1)
    assert heads.shape == (2, 4, 3, 2)
    assert spread.shape == (2, 3, 2)
    assert torch.equal(heads.flatten(2), probabilities(trunk, image)[1][:, :, 0, 1:])
    assert (heads.sum((2, 3)) <= 1 + 1e-5).all()


def test_rollout_of_blocks_that_look_nowhere_else_is_the_identity():
    same = torch.eye(5).expand(1, 2, 5, 5)
    torch.testing.assert_close(rollout([same, same]), torch.eye(5)[None])
    even = torch.full((1, 2, 5, 5), 0.2)
    half = 0.5 * torch.eye(5) + 0.1
    torch.testing.assert_close(rollout([even, even]), (half @ half)[None])
    torch.testing.assert_close(rollout([even, same, even]).sum(-1), torch.ones(1, 5))


def test_a_trunk_without_a_softmax_over_all_tokens_is_refused():
    with pytest.raises(ConfigError, match="no such map"):
        probabilities(make(attention="strided", attention_stride=1, class_token=False), torch.randn(1, 3, 24, 16))


def test_a_block_that_is_not_there_and_a_missing_image_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--block=3: the trunk has 3 blocks"):
        maps(make(), torch.randn(1, 3, 24, 16), block=3)
    with pytest.raises(ConfigError, match="no such file"):
        main(["finetune/demo", str(tmp_path / "none.png"), "--out", str(tmp_path / "out")])


def test_a_picture_is_drawn_for_each_image(tmp_path, capsys):
    for name in ("a", "b"):
        pixels = torch.randint(0, 255, (3, 50, 60), dtype=torch.uint8)
        write_file(str(tmp_path / f"{name}.png"), encode_png(pixels))
    images = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    assert main(["finetune/demo", *images, "--size", "64", "--out", str(tmp_path / "out")]) == 0
    assert all(read_file(str(tmp_path / "out" / f"{name}.png")).numel() for name in ("a", "b"))
    assert "3 heads of block 5, rollout" in capsys.readouterr().out


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ConfigError, match=r"IMAGE='.*text\.jpg': not an image"):
        main(["pretrain/demo", str(tmp_path / "text.jpg"), "--out", str(tmp_path)])
