"""The trunk: the same tokens from whole images and visible patches, names, counts, refusals."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.vit import block_flops

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 16}


def build(image_size=(48, 64), **options):
    torch.manual_seed(0)
    return ViT(Model(**(SMALL | options)), image_size)


def random_masks(batch, tokens, visible):
    order = torch.rand(batch, tokens).argsort(1)
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, order[:, visible:], True)


@pytest.mark.parametrize("stem", ["patch", "hmlp"])
@pytest.mark.parametrize("position", ["none", "learned", "sincos"])
def test_visible_patches_enter_the_blocks_as_in_the_whole_image(stem, position):
    vit = build(stem=stem, position=position, registers=2)
    image = torch.randn(3, 3, 48, 64)
    mask = random_masks(3, 12, 5)
    index = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :5]
    whole = vit.embed(image)
    some = vit.embed(image, index)
    assert some.shape == (3, 3 + 5, 32)
    assert torch.equal(some[:, :3], whole[:, :3])
    for sample in range(3):
        torch.testing.assert_close(some[sample, 3:], whole[sample, 3:][~mask[sample]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "hmlp"])
def test_nothing_hidden_is_the_ordinary_forward(stem):
    vit = build(stem=stem)
    image = torch.randn(2, 3, 48, 64)
    nothing = torch.zeros(2, 12, dtype=torch.bool)
    torch.testing.assert_close(vit(image, nothing, 12), vit(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "hmlp"])
def test_hidden_pixels_cannot_be_seen(stem):
    vit = build(stem=stem)
    image = torch.randn(2, 3, 48, 64)
    mask = random_masks(2, 12, 4)
    cover = mask.view(2, 1, 3, 1, 4, 1).expand(-1, 3, -1, 16, -1, 16).reshape(image.shape)
    other = torch.where(cover, torch.randn_like(image), image)
    assert torch.equal(vit(image, mask, 4), vit(other, mask, 4))
    assert not torch.equal(vit(image, mask, 4), vit(torch.where(cover, image, other + 1), mask, 4))


def test_a_mask_needs_its_count():
    with pytest.raises(ValueError, match="visible"):
        build()(torch.randn(1, 3, 48, 64), torch.zeros(1, 12, dtype=torch.bool))


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="resize"):
        build()(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Model(size="s"), "vit_small_patch16_224"),
        (Model(size="ti", layer_scale=1e-5, depth=2), "vit_tiny_patch16_224"),
        (Model(size="s", depth=3, parallel=2, layer_scale=1e-5), "vit_small_patch16_18x2_224"),
    ],
)
def test_names_and_shapes_are_those_of_timm(ours, theirs):
    more = {"num_classes": 0} | ({"depth": ours.depth} if ours.depth else {})
    more |= {"init_values": ours.layer_scale} if ours.layer_scale else {}
    with torch.device("meta"):
        peer = timm.create_model(theirs, **more)
        vit = ViT(ours, 224)
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (vit, peer)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("parallel", [1, 2])
def test_values_are_those_of_timm(parallel):
    vit = build(image_size=48, parallel=parallel, layer_scale=0.5, registers=0).eval()
    block = timm.models.vision_transformer.ParallelThingsBlock if parallel > 1 else None
    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=48,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="",
        init_values=0.5,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **({"block_fn": block} if block else {}),
    ).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    peer.load_state_dict(vit.state_dict())
    image = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(vit(image), peer(image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "head", "count"),
    [
        # timm's ViT-S and its parallel models, with a head of 1000 classes.
        ({"size": "s", "depth": 18, "parallel": 2, "layer_scale": 1e-5}, 384, 64_665_448),
        ({"size": "b", "depth": 18, "parallel": 2, "layer_scale": 1e-5}, 768, 256_731_880),
        # DeiT III: no position for the class token.
        ({"size": "s", "depth": 18, "parallel": 2, "position_on_class": False}, 384, 64_637_416),
        ({"size": "b", "depth": 36, "layer_scale": 1e-4, "position_on_class": False}, 768, 256_731_112),
    ],
)
def test_parameter_counts_at_224(options, head, count):
    with torch.device("meta"):
        vit = ViT(Model(**options), 224)
    assert sum(p.numel() for p in vit.parameters()) + head * 1000 + 1000 == count


@pytest.mark.parametrize(
    ("size", "total", "attention"),
    [("s", 22_205_416, 7_096_320), ("b", 86_877_160, 28_348_416), ("l", 304_763_880, 100_761_600)],
)
def test_parameter_counts_at_384(size, total, attention):
    with torch.device("meta"):
        vit = ViT(Model(size=size, layer_scale=1e-4, position_on_class=False), 384)
    head = vit.width * 1000 + 1000
    assert sum(p.numel() for p in vit.parameters()) + head == total
    assert sum(p.numel() for block in vit.blocks for p in block.attn.parameters()) == attention


def test_shared_blocks_hold_one_module_per_group():
    vit = build(depth=4, share=2)
    assert len(vit.blocks) == 2
    assert {"blocks.1.norm1.1.weight", "blocks.1.attn.qkv.weight"} <= set(vit.state_dict())
    image = torch.randn(2, 3, 48, 64)
    x = vit.embed(image)
    for block in vit.blocks:
        x = block(block(x, 0), 1)
    assert torch.equal(vit(image), vit.norm(x))


def test_drop_path_rises_over_depth_or_stays():
    ramp = build(depth=4, share=2, drop_path=0.3)
    assert [rate for block in ramp.blocks for rate in block.rates] == pytest.approx([0, 0.1, 0.2, 0.3])
    flat = build(depth=2, parallel=2, drop_path=0.3, drop_path_shape="constant")
    assert [block.rate for block in flat.blocks] == [0.3, 0.3]


def test_initial_weights_are_those_of_mae():
    vit = build(width=128, heads=4, position="sincos", registers=1)
    qkv = vit.blocks[0].attn.qkv.weight
    bound = (6 / (4 * 128)) ** 0.5  # one matrix [3D, D], not three
    assert 0.97 * bound < qkv.abs().max() <= bound
    pixels = vit.patch_embed.proj.weight
    bound = (6 / (128 + 768)) ** 0.5
    assert 0.97 * bound < pixels.abs().max() <= bound
    assert (vit.patch_embed.proj.bias != 0).all()
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert vit.reg_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert (vit.blocks[0].mlp.fc1.bias == 0).all()
    assert not vit.pos_embed.requires_grad
    assert (vit.pos_embed[:, 0] == 0).all()


def test_the_hmlp_stem_keeps_pytorch_s_initial_weights():
    weight = build(width=128, heads=4, stem="hmlp").patch_embed.proj[3].weight
    bound = 1 / (32 * 4) ** 0.5
    assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "image_size", "key"),
    [
        ({"share": 2, "parallel": 2}, 48, "model.share"),
        ({"position": "sincos", "width": 30}, 48, "model.position"),
        ({}, 50, "data.image_size"),
        ({}, (48, 50), "data.image_size"),
    ],
)
def test_parts_that_cannot_stand_together_are_refused(options, image_size, key):
    with pytest.raises(ConfigError) as refused:
        build(image_size, **options)
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"stem": "conv"}, "model.stem"),
        ({"stem": "hmlp", "stem_norm": "batch"}, "model.stem_norm"),
    ],
)
def test_leaking_stems_are_no_encoders_of_visible_patches(options, key):
    with pytest.raises(ConfigError) as refused:
        build(**options).check_visible_only()
    assert refused.value.key == key
    build(stem="hmlp").check_visible_only()
    build(stem="patch").check_visible_only()


def test_flops_are_those_of_the_published_models():
    # ViT-B/16 at 224: 17.58 GMAC (Three things, table 7), class token included, head left out.
    with torch.device("meta"):
        vit = ViT(Model(size="b"), 224)
        hmlp = ViT(Model(size="b", stem="hmlp"), 224)
    assert vit.flops() / 2e9 == pytest.approx(17.58, abs=0.02)
    assert (hmlp.flops() - vit.flops()) / 2e9 == pytest.approx(0.1445, abs=1e-4)
    assert vit.flops(49) < vit.flops() / 3.9


def test_attention_to_a_window_costs_only_the_window():
    with torch.device("meta"):
        everywhere, near = (
            ViT(Model(size="s", class_token=False, attention=kind), 224) for kind in ("softmax", "convolutional")
        )
    products = 2 * 2 * 196 * 384  # FLOPs per key, block and image: scores and weighted values
    assert everywhere.flops() - near.flops() == pytest.approx(12 * products * (196 - 9))


def test_block_flops_count_matrix_products():
    tokens, width, hidden, asked = 5, 4, 16, 3
    qkv = asked * width * width + tokens * 2 * width * width
    products = 2 * asked * tokens * width
    rest = asked * width * width + 2 * asked * width * hidden
    assert block_flops(tokens, width, hidden, asked) == 2 * (qkv + products + rest)
    assert block_flops(tokens, width, hidden) == block_flops(tokens, width, hidden, asked=tokens)
