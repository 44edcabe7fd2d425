"""Smaller parts: PEG, PowerNorm, re-attention, rotary positions, gated MLPs, norms, mask tokens, traces."""

import pytest
import ranks
import timm
import torch
from torch import nn

from halfseen.config import ConfigError, Model
from halfseen.engines.recompute import refuse_statistics
from halfseen.models import ViT
from halfseen.models.block import Block
from halfseen.models.peg import PEG
from halfseen.models.powernorm import PowerNorm
from halfseen.models.reattention import ReAttention
from halfseen.models.rotary import angles, rotate
from halfseen.models.swiglu import SwiGLU

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 16}


def build(image_size=(32, 48), **options):
    torch.manual_seed(0)
    return ViT(Model(**(SMALL | options)), image_size)


# ----------------------------------------------------------------------------------------------------- positions


def test_a_peg_is_that_of_twins_and_leaves_prefix_tokens_alone():
    ours, theirs = PEG(8, (2, 3), prefix=2), timm.models.twins.PosConv(8, 8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 8)
    torch.testing.assert_close(ours(x)[:, 2:], theirs(x[:, 2:], (2, 3)))
    assert torch.equal(ours(x)[:, :2], x[:, :2])


def test_without_positions_only_a_peg_tells_places_apart():
    image = torch.ones(1, 3, 48, 48)
    plain, located = (build(48, position="none", peg=peg).eval()(image)[0, 1:] for peg in (0, 1))
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))
    assert not torch.allclose(located[0], located[4], atol=1e-4)


def test_rotation_makes_scores_depend_on_offsets_alone():
    rotation = angles(8, (4, 5), 0, 100.0)
    q, k = torch.randn(8), torch.randn(8)

    def score(query, key):
        pair = torch.stack([q, k])[:, None]
        turned = rotate(pair, torch.stack([rotation[query], rotation[key]])[:, None])
        return (turned[0] @ turned[1].T).item()

    places = [(y * 5 + x, (y + 1) * 5 + x + 2) for y in range(3) for x in range(3)]
    scores = [score(query, key) for query, key in places]
    assert max(scores) - min(scores) < 1e-4
    assert abs(score(0, 1) - score(0, 5)) > 1e-4


def test_prefix_tokens_are_not_turned_and_lengths_stay():
    rotation, x = angles(8, (2, 2), 3, 100.0), torch.randn(2, 1, 7, 8)
    turned = rotate(x, rotation)
    assert torch.equal(turned[:, :, :3], x[:, :, :3])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


# --------------------------------------------------------------------------------------------------------- norms


def test_powernorm_divides_by_the_batch_then_by_the_running_square():
    norm = PowerNorm(4, eps=0.0, warmup=2).train()
    norm.running_phi.fill_(9.0)
    x = torch.randn(3, 5, 4)
    scaled = x / x.square().mean(-1, keepdim=True).sqrt()
    square = scaled.square().mean((0, 1))
    torch.testing.assert_close(norm(x), scaled / square.sqrt())
    # First step: the average of one is the batch's square, and the moving average starts from there.
    torch.testing.assert_close(norm.running_phi, square)
    norm.iters.fill_(2)
    before = norm.running_phi.fill_(9.0).clone()
    torch.testing.assert_close(norm(x), scaled / before.sqrt())
    torch.testing.assert_close(norm.running_phi, 0.9 * before + 0.1 * square)


def test_powernorm_s_evaluation_moves_nothing():
    norm = PowerNorm(4).eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.randn(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def halves(world):
    """One rank's half of a batch; the statistics and gradients it comes to."""
    torch.manual_seed(0)
    x, norm = torch.randn(2 * 3, 4), PowerNorm(4)
    rows = x[world.rank * 3 :][:3] if world.world > 1 else x
    (norm(rows).pow(3)).sum().backward()
    return norm.running_phi.tolist(), norm.ema_gz.tolist()


@pytest.mark.slow
def test_powernorm_s_statistics_are_those_of_all_ranks():
    (alone,), both = ranks.run(halves, 1), ranks.run(halves, 2)
    for found in both:
        for mine, whole in zip(found, alone):
            assert mine == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "moving"), [({"norm": "power"}, True), ({"attention": "reattention"}, True), ({"peg": 1}, False)]
)
def test_blocks_whose_norms_keep_statistics_are_not_recomputed(options, moving):
    for block in build(**options).blocks[:1]:
        if not moving:
            refuse_statistics(block)
            continue
        with pytest.raises(ConfigError, match="running statistics") as refused:
            refuse_statistics(block)
        assert refused.value.key == "engine.recompute"


@pytest.mark.parametrize("place", ["post", "res_post"])
def test_norms_stand_where_they_are_said_to(place):
    torch.manual_seed(0)
    block, x = Block(16, 2, 32, norm_place=place, layer_scale=0.5), torch.randn(2, 5, 16)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
    if place == "post":
        middle = block.norm1(x + 0.5 * block.attn(x))
        expected = block.norm2(middle + 0.5 * block.mlp(middle))
    else:
        middle = x + 0.5 * block.norm1(block.attn(x))
        expected = middle + 0.5 * block.norm2(block.mlp(middle))
    torch.testing.assert_close(block(x), expected)


def test_res_post_is_timm_s_block():
    ours, theirs = Block(16, 2, 64, norm_place="res_post"), timm.models.vision_transformer.ResPostBlock
    theirs = theirs(16, 2, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_post_norm_trunk_has_no_last_norm():
    vit = build(norm_place="post")
    assert not any(name.startswith("norm.") for name in vit.state_dict())
    tokens = vit(torch.randn(2, 3, 32, 48))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 7), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------- attention, MLP


def test_reattention_normalises_each_head_over_batch_and_map():
    torch.manual_seed(0)
    module, weights = ReAttention(3, scale=2.0).train(), torch.rand(2, 3, 5, 5)
    mixed = torch.einsum("gh,bhij->bgij", module.matrix.weight[:, :, 0, 0], weights)
    mixed = mixed + module.matrix.bias[:, None, None]
    mean, deviation = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(module(weights), 2 * (mixed - mean) / (deviation + 1e-5).sqrt(), rtol=1e-3, atol=1e-4)


def test_a_gated_mlp_is_timm_s_and_as_large_as_a_plain_one():
    ours = SwiGLU(16, 96)
    theirs = timm.layers.SwiGLU(16, 64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    sizes = [sum(p.numel() for p in build(width=384, mlp=mlp).parameters()) for mlp in ("gelu", "swiglu")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_attention_of_choice_stands_in_the_blocks_named():
    vit = build(attention="reattention", attention_blocks=[1])
    assert [any("reattention" in name for name in block.state_dict()) for block in vit.blocks] == [False, True]


# --------------------------------------------------------------------------------------------- tokens and traces


@pytest.mark.parametrize("position", ["learned", "none"])
def test_hidden_patches_become_the_mask_token_before_their_position(position):
    vit = build(position=position, registers=1).eval()
    image, token = torch.randn(2, 3, 32, 48), torch.randn(1, 1, 32)
    mask = torch.tensor([[True, False] * 3, [False] * 5 + [True]])
    places = 0.0 if vit.pos_embed is None else vit.pos_embed[:, 1:]
    stem = vit.patch_embed(image)
    weight = mask[..., None].float()
    patches = stem * (1 - weight) + token * weight + places
    torch.testing.assert_close(vit.embed(image, mask=mask, mask_token=token)[:, 2:], patches)
    cover = mask.view(2, 1, 2, 1, 3, 1).expand(-1, 3, -1, 16, -1, 16).reshape(image.shape)
    other = torch.where(cover, torch.randn_like(image), image)
    assert torch.equal(vit(image, mask, mask_token=token), vit(other, mask, mask_token=token))


def test_a_mask_token_needs_its_mask_and_all_tokens():
    vit, image, token = build(), torch.randn(1, 3, 32, 48), torch.randn(1, 1, 32)
    with pytest.raises(ValueError, match="give mask"):
        vit(image, mask_token=token)
    with pytest.raises(ValueError, match="no index"):
        vit(image, torch.zeros(1, 6, dtype=torch.bool), index=torch.tensor([[0]]), mask_token=token)


def test_a_distillation_token_stands_after_the_class_token_as_in_deit():
    vit = build((32, 32), distillation_token=True, registers=1).eval()
    peer = timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    assert vit.prefix == 3
    assert vit.state_dict()["pos_embed"].shape == peer.pos_embed.shape
    vit = build((32, 32), distillation_token=True).eval()
    peer.load_state_dict(vit.state_dict())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(image), peer.eval().forward_features(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [1, 2])
def test_a_trace_holds_the_queries_keys_and_values_asked_for(share):
    vit = build(depth=4, share=share, relative="shared", key_bias=False, drop_path=0.5)
    image = torch.randn(2, 3, 32, 48)
    trace = vit.eval().trace(image, layers=(1, 2), qkv=(2, 3))
    assert sorted(trace.layers) == [1, 2]
    assert sorted(trace.qkv) == [2, 3]
    block = vit.blocks[3 // share]
    norm = block.norm1[1] if share == 2 else block.norm1
    attention = block.attn
    bias = torch.cat([attention.q_bias, torch.zeros(32), attention.v_bias])
    torch.testing.assert_close(trace.qkv[3], attention.qkv(norm(trace.layers[2])) + bias)
    # In training too every sample is there, dropped or not.
    assert vit.train().trace(image, qkv=(3,)).qkv[3].shape == (2, 7, 96)


def test_a_trace_of_what_does_not_exist_is_refused():
    image = torch.randn(1, 3, 32, 48)
    with pytest.raises(ValueError, match="no blocks"):
        build().trace(image, layers=(2,))
    with pytest.raises(ValueError, match="queries"):
        build(parallel=2).trace(image, qkv=(0,))
