"""Parts are independent choices: every legal combination builds, trains, and is the same when recomputed."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.legality import OFF_OVER_A_MAP, OVER_A_MAP, check, check_visible_only
from halfseen.models.powernorm import PowerNorm

IMAGE = (32, 48)  # a grid of 2 x 3
CHOICES = {
    "stem": ("patch", "hmlp", "conv"),
    "stem_norm": ("layer", "batch"),
    "position": ("none", "learned", "sincos"),
    "position_on_class": (True, False),
    "relative": ("none", "shared", "block"),
    "rope": (False, True),
    "irpe": ("none", "product", "euclidean", "quant", "cross"),
    "irpe_on": ("q", "k", "v", "qk", "qv", "kv", "qkv"),
    "irpe_mode": ("contextual", "bias"),
    "irpe_shared": (True, False),
    "attention": ("softmax", "reattention", "strided", "convolutional"),
    "attention_padding": ("masked", "zero"),
    "attention_blocks": ([], [1], [0, 3]),
    "head_width": (None, 12),
    "head_mixing": ("none", "linear", "affine"),
    "class_token": (True, False),
    "distillation_token": (False, True),
    "registers": (0, 2),
    "peg": (0, 2),
    "norm": ("layer", "power"),
    "norm_place": ("pre", "post", "res_post"),
    "mlp": ("gelu", "swiglu"),
    "parallel": (1, 2, 3),
    "share": (1, 2),
    "layer_scale": (None, 0.1),
    "drop_path": (0.0, 0.05, 0.3),
    "qkv_bias": (True, False),
    "key_bias": (True, False),
}
# Each part is off in half of the draws, or hardly any combination would be legal.
PARTS = {name: st.one_of(st.just(values[0]), st.sampled_from(values)) for name, values in CHOICES.items()}
MANY = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def model_of(options):
    # Attention over a map excludes so much that it would hardly ever be drawn with all of that off.
    off = OFF_OVER_A_MAP if options["attention"] in OVER_A_MAP else {}
    return Model(width=32, depth=4, heads=2, patch=16, mlp_ratio=2.0, **(options | off))


def passes(rule, model):
    try:
        rule(model)
    except ConfigError:
        return False
    return True


def legal(*rules, **fixed):
    """Models that pass all rules, with some options fixed."""
    models = st.fixed_dictionaries(PARTS | {name: st.just(value) for name, value in fixed.items()}).map(model_of)
    return models.filter(lambda model: all(passes(rule, model) for rule in (check, *rules)))


def build(model):
    torch.manual_seed(0)
    vit = ViT(model, IMAGE)
    for parameter in vit.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return vit


def keeps_statistics(vit):
    return any(isinstance(module, (_BatchNorm, PowerNorm)) for module in vit.modules())


def run(vit, **options):
    """Tokens and every gradient of one step."""
    torch.manual_seed(1)
    image = torch.randn(3, 3, *IMAGE)
    vit.zero_grad()
    tokens = vit(image, **options)
    (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    return tokens.detach(), {name: p.grad for name, p in vit.named_parameters() if p.requires_grad}


@MANY
@given(legal())
def test_every_legal_combination_trains_and_is_the_same_when_recomputed(model):
    vit = build(model).train()
    tokens, gradients = run(vit)
    assert tokens.shape == (3, vit.prefix + 6, 32)
    assert torch.isfinite(tokens).all()
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not without
    if keeps_statistics(vit):
        vit.eval()  # moving statistics would move twice; the engine refuses that
    tokens, gradients = run(vit)
    for block in vit.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again, recomputed = run(vit)
    assert torch.equal(again, tokens)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@MANY
@given(legal())
def test_a_trace_changes_nothing_and_holds_what_every_block_left(model):
    vit = build(model).eval()
    image = torch.randn(2, 3, *IMAGE)
    trace = vit.trace(image, layers=range(4))
    assert torch.equal(trace.tokens, vit(image))
    assert sorted(trace.layers) == [0, 1, 2, 3]
    assert torch.equal(vit.norm(trace.layers[3]), trace.tokens)


@MANY
@given(legal(share=2))
def test_the_repetition_of_a_shared_block_is_an_argument(model):
    vit = build(model).eval()
    image = torch.randn(2, 3, *IMAGE)
    x, places = vit.embed(image), vit.places()
    for block in vit.blocks:
        # Backwards first: nothing may be left over from one call to the next.
        block(x, 1, places=places)
        x = block(block(x, 0, places=places), 1, places=places)
    assert torch.equal(vit.norm(x), vit(image))


@MANY
@given(legal(check_visible_only))
def test_with_all_patches_visible_an_encoder_of_visible_patches_is_the_ordinary_one(model):
    vit = build(model).eval()
    image = torch.randn(2, 3, *IMAGE)
    everything = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(vit(image, index=everything), vit(image), rtol=1e-4, atol=1e-5)
    few = torch.tensor([[0, 4], [3, 5]])
    assert vit(image, index=few).shape == (2, vit.prefix + 2, 32)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"share": 2, "parallel": 2}, "model.share"),
        ({"parallel": 2, "norm_place": "post"}, "model.norm_place"),
        ({"position": "sincos", "width": 30}, "model.position"),
        ({"rope": True, "width": 12}, "model.rope"),
        ({"distillation_token": True, "class_token": False}, "model.distillation_token"),
        ({"irpe": "product", "irpe_mode": "bias", "irpe_on": "qkv"}, "model.irpe_on"),
        ({"attention_blocks": [0]}, "model.attention_blocks"),
        ({"attention": "reattention", "attention_blocks": [4]}, "model.attention_blocks"),
        ({"attention": "reattention", "attention_blocks": [0], "share": 2}, "model.attention_blocks"),
        ({"head_width": 8}, "model.head_width"),
        ({"attention": "convolutional"}, "model.class_token"),
        ({"attention": "convolutional", "class_token": False, "attention_kernel": 4}, "model.attention_kernel"),
        ({"attention": "strided", "class_token": False, "registers": 1}, "model.registers"),
        ({"attention": "strided", "class_token": False, "relative": "block"}, "model.relative"),
        ({"peg": 5}, "model.peg"),
        ({"peg": 1, "share": 2}, "model.peg"),
    ],
)
def test_illegal_combinations_are_refused_without_a_tensor(options, key, monkeypatch):
    monkeypatch.setattr(torch.nn.Parameter, "__new__", None)
    with pytest.raises(ConfigError) as refused:
        check(Model(**({"width": 32, "depth": 4, "heads": 2} | options)))
    assert refused.value.key == key
    assert "fix:" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"stem": "conv"}, "model.stem"),
        ({"stem": "hmlp", "stem_norm": "batch"}, "model.stem_norm"),
        ({"attention": "convolutional", "class_token": False}, "model.attention"),
        ({"attention": "reattention"}, "model.attention"),
        ({"peg": 1}, "model.peg"),
        ({"norm": "power"}, "model.norm"),
    ],
)
def test_an_encoder_of_visible_patches_refuses_what_needs_the_others(options, key):
    with pytest.raises(ConfigError) as refused:
        check_visible_only(Model(**options))
    assert refused.value.key == key
