"""Hierarchical trunks: what is hidden reaches nothing, timm computes the same, rates and FLOPs are counted as there."""

import pytest
import timm
import torch
from small_trunks import FAMILIES
from timm.optim import param_groups_layer_decay

from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError
from halfseen.models import trunks
from halfseen.models.alternet import AlterNetConfig
from halfseen.models.hierarchical import TimmConfig, TimmTrunk
from halfseen.models.pyramid import PyramidConfig
from halfseen.models.swin import Swin, SwinConfig

ALTERNET = AlterNetConfig(depth="18", width=8, window=2, head_width=4)


def sections():
    return {
        name: (TimmConfig(model, 0.0, dict(options)), size) for name, (model, size, options) in FAMILIES.items()
    } | {
        "alternet": (ALTERNET, 64),
        "pyramid": (
            PyramidConfig(depths=[1, 1], widths=[8, 16], heads=[1, 2], mlp_ratios=[2, 2], reductions=[2, 1]),
            64,
        ),
        "swin of ours": (SwinConfig(width=16, depths=[1, 2], heads=[1, 2], window=4), 64),
    }


def made(name):
    torch.manual_seed(0)
    section, size = sections()[name]
    return trunks.build(section, size).eval(), size


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trunk_computes_what_timm_does(name):
    trunk, size = made(name)
    image = torch.randn(2, 3, size, size)
    expected = trunk.body.forward_features(image)
    if expected.ndim == 4:
        maps_first = expected.shape[1] == trunk.width
        expected = expected.flatten(2).transpose(1, 2) if maps_first else expected.flatten(1, 2)
    tokens = trunk(image)
    assert torch.equal(tokens, expected)
    assert tokens.shape == (2, trunk.prefix + trunk.tokens, trunk.width)
    assert trunk.tokens == (size // trunk.stride) ** 2 == trunk.grid[0] * trunk.grid[1]
    assert trunks.stride_of(trunk.cfg, size) == trunk.stride


@pytest.mark.parametrize("name", sections())
def test_what_is_hidden_reaches_nothing_and_what_is_shown_does(name):
    trunk, size = made(name)
    torch.manual_seed(1)
    mask = torch.rand(2, (size // trunk.stride) ** 2) < 0.5
    token, image = torch.randn(1, 1, trunk.stem_width), torch.randn(2, 3, size, size)
    side = size // trunk.stride
    pixels = mask.view(2, 1, side, side).repeat_interleave(trunk.stride, 2).repeat_interleave(trunk.stride, 3)
    before = trunk(image, mask, token)
    assert torch.equal(trunk(torch.where(pixels, torch.randn_like(image), image), mask, token), before)
    assert not torch.equal(trunk(torch.where(pixels, image, torch.randn_like(image)), mask, token), before)
    assert not torch.equal(trunk(image, mask, token + 1), before)
    assert torch.equal(trunk(image, torch.zeros_like(mask), token), trunk(image))


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_wise_rates_are_timm_s(name):
    """Of the same model with a head, whose parameters must be in the groups timm's own function makes."""
    trunk, size = made(name)
    model, _, options = FAMILIES[name]
    sized = {} if name == "pvt_v2" else {"img_size": size}
    theirs = timm.create_model(model, num_classes=5, **sized, **options)
    names = {id(parameter): key for key, parameter in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, layer_decay=0.5)
    expected = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    student = Classifier(trunk, Task(pool="norm_mean"), 5)
    found = {key: 0.5 ** (student.layers() - student.layer_of(key)) for key, _ in student.named_parameters()}
    assert {key.removeprefix("encoder.body.").replace("head.fc.", "head."): rate for key, rate in found.items()} == {
        key.replace("head.fc.", "head."): rate for key, rate in expected.items()
    }


def test_layers_of_swin_are_simmims_and_of_alternet_its_blocks():
    swin = Classifier(made("swin of ours")[0], Task(), 3)
    layers = {
        "encoder.patch_embed.proj.weight": 0,
        "encoder.layers.0.blocks.0.norm1.weight": 1,
        "encoder.layers.1.downsample.norm.weight": 1,
        "encoder.layers.1.blocks.0.mlp.fc1.weight": 2,
        "encoder.layers.1.blocks.1.mlp.fc1.weight": 3,
        "fc_norm.weight": 4,
        "head.weight": 4,
    }
    assert {name: swin.layer_of(name) for name in layers} == layers
    assert swin.layers() == 4
    net = Classifier(made("alternet")[0], Task(pool="norm_mean"), 3)
    assert [net.layer_of(f"encoder.{name}") for name in ("stem.weight", "blocks.7.norm1.weight", "norm.bias")] == [
        0,
        8,
        9,
    ]


@pytest.mark.parametrize("name", sections())
def test_flops_are_counted_without_touching_the_trunk_or_its_random_numbers(name):
    trunk, size = made(name)
    before = torch.get_rng_state()
    count = trunk.flops()
    assert count > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.device.type == "cpu" for parameter in trunk.parameters())


def test_the_two_swins_count_nearly_the_same():
    ours = Swin(SwinConfig(size="t"), 224).flops()
    assert TimmTrunk(TimmConfig(), 224).flops() == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize(
    ("cfg", "size", "reason"),
    [
        (TimmConfig("no_such_model"), 64, "timm cannot make it"),
        (TimmConfig("vit_tiny_patch16_224"), 64, "is none of SwinTransformer, Nest"),
        (TimmConfig("pvt_v2_b0"), 72, "a place is 32 pixels"),
        (TimmConfig("nest_tiny"), 72, "timm cannot make it for 72 pixels"),
        (TimmConfig("pvt_v2_b0", 0.0, {"depth": 3}), 64, "timm cannot make it"),
        (AlterNetConfig(), 256, "multiple of 224"),
    ],
)
def test_a_trunk_that_cannot_be_is_refused(cfg, size, reason):
    with pytest.raises(ConfigError, match=reason):
        trunks.build(cfg, size)


def test_what_a_hierarchical_trunk_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"timm\.drop_path"):
        TimmConfig("pvt_v2_b0", 0.0, {"drop_path_rate": 0.1}).check("timm")
    trunk, _ = made("pvt_v2")
    with pytest.raises(ConfigError, match="does not tell what its blocks compute"):
        trunk.trace(torch.zeros(1, 3, 64, 64), layers=[0])
    with pytest.raises(ConfigError, match="no class token"):
        Classifier(trunk, Task(pool="class"), 3)
    with pytest.raises(ConfigError, match="before the mean"):
        Classifier(trunk, Task(pool="mean"), 3)
    with pytest.raises(ConfigError, match="nothing that is 'attention'"):
        Classifier(trunk, Task(pool="norm_mean", train="attention"), 3)
