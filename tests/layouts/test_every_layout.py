"""Whatever a layout has a place for comes back bit for bit: every layout, made-up students and official weights."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfseen.config import Model
from halfseen.layouts import LAYOUTS, detect
from halfseen.models import ViT
from halfseen.models.alternet import AlterNet, AlterNetConfig
from halfseen.models.hierarchical import TimmConfig, TimmTrunk
from halfseen.models.swin import Swin, SwinConfig
from halfseen.pretrain.mae import MAE, MAEConfig
from halfseen.pretrain.mim import MIM, MIMConfig
from halfseen.pretrain.simmim import SimMIM
from halfseen.pretrain.targets import Pixels

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = {"width": 16, "depth": 11, "heads": 2, "patch": 8}
SWIN = {"width": 8, "depths": [2, 4], "heads": [1, 2], "window": 4}
PVT = {"embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
BEIT = VIT | {"key_bias": False, "layer_scale": 0.1, "position": "none"}


def under_encoder(trunk):
    return {f"encoder.{name}": value for name, value in trunk.state_dict().items()}


def mae():
    return MAE(ViT(Model(**VIT), 32), MAEConfig(decoder_width=8, decoder_depth=2, decoder_heads=2), 12, Pixels(8, True))


def mim():
    return MIM(ViT(Model(**BEIT, relative="shared"), 32), MIMConfig(), 8, Pixels(8, True))


def simmim():
    return SimMIM(Swin(SwinConfig(**SWIN), 64), MIMConfig(), 20, Pixels(8, False), 8)


# What each layout must hold whole, made here.
STUDENTS = {
    "plain": lambda: under_encoder(ViT(Model(**VIT), 32)),
    "registers, hMLP, parallel": lambda: under_encoder(ViT(Model(**VIT, stem="hmlp", registers=2, parallel=2), 32)),
    "beit, a table per block": lambda: under_encoder(ViT(Model(**BEIT, relative="block"), 32)),
    "irpe": lambda: under_encoder(ViT(Model(**VIT, irpe="product", irpe_on="qkv", irpe_shared=False), 32)),
    "mae": lambda: mae().state_dict(),
    "mim": lambda: mim().state_dict(),
    "swin": lambda: under_encoder(Swin(SwinConfig(**SWIN), 64)),
    "simmim": lambda: simmim().state_dict(),
    "of timm": lambda: under_encoder(TimmTrunk(TimmConfig("pvt_v2_b0", 0.0, dict(PVT)), 64)),
}
WHOLE = {
    "plain": ("halfseen", "timm", "mae", "deit", "transformers_vit", "transformers_vit_model"),
    "registers, hMLP, parallel": ("halfseen", "timm", "deit"),
    "beit, a table per block": ("halfseen", "beit", "timm_beit", "transformers_beit", "transformers_beit_model"),
    "irpe": ("halfseen", "irpe"),
    "mae": ("halfseen", "mae", "transformers_mae"),
    "mim": ("halfseen", "simmim", "beit", "transformers_beit_mim"),
    "swin": ("halfseen", "swin", "timm_swin"),
    "simmim": ("halfseen", "simmim"),
    "of timm": ("halfseen", "timm_hierarchical"),
}
CASES = [(kind, layout) for kind, layouts in WHOLE.items() for layout in layouts]


def randomised(weights):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_our_students_come_back_from_every_layout_that_holds_them(kind, name):
    weights = randomised(STUDENTS[kind]())
    layout = LAYOUTS[name]
    theirs = layout.give(weights)
    back = layout.take(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@functools.cache
def official():
    """Weights of every reference case, by case."""
    found = {}
    for path in sorted(GOLDEN.glob("*.safetensors")):
        tensors = load_file(path)
        state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
        if state:
            found[path.stem] = state
    return found


def detected(state):
    return next((layout for layout in LAYOUTS.values() if layout.owns(set(state))), None)


MADE = ("relative_position_index", "attn_mask")  # tables that follow from the sizes, made anew where they can be


@pytest.mark.parametrize("case", [case for case in official() if case != "beit2_vqkd_a"])  # that file holds its teacher
def test_official_weights_come_back_from_the_layout_that_is_detected(case):
    state = official()[case]
    layout = detected(state)
    if layout is None:
        pytest.skip("a module alone, in no layout of a whole model")
    back = layout.give(layout.take(state))
    learned = {name: value for name, value in state.items() if not name.endswith(MADE)}
    assert {name for name in back if not name.endswith(MADE)} == set(learned)
    for name, value in back.items():
        if name in state:
            assert value.dtype == state[name].dtype, name
            assert torch.equal(value, state[name]), name


def test_every_layout_is_tried_here_or_in_a_test_of_its_own():
    tried = {layout for _, layout in CASES}
    tried |= {layout.name for layout in map(detected, official().values()) if layout is not None}
    assert set(LAYOUTS) - tried <= {"dalle", "peg", "pvt"}


def test_the_given_names_are_detected_as_their_own():
    shared = {"plain": {"mae", "deit"}, "beit, a table per block": set()}
    for kind, name in CASES:
        theirs = LAYOUTS[name].give(randomised(STUDENTS[kind]()))
        if name not in shared.get(kind, ()) and not (kind == "registers, hMLP, parallel" and name == "timm"):
            assert detect(theirs).name == name, (kind, name)


# Layouts of a whole model or of a module that is no ViT, and of ViTs with parts that a plain one lacks.
NO_PLAIN_VITS = ("swin", "timm_swin", "mini_swin", "mini_deit", "vqkd", "dalle", "cpvt", "pvt", "peg", "deit_stem")
NO_PLAIN_VITS += ("timm_hierarchical", "hdvw", "hdvw_convit")


@pytest.mark.parametrize("name", NO_PLAIN_VITS)
def test_a_plain_vit_has_no_place_where_another_model_is_described(name):
    names = {f"encoder.{name}" for name in ViT(Model(width=16, depth=2, heads=2, patch=8), 16).state_dict()}
    blocks = {own for own in LAYOUTS[name].from_ours(names) if own.startswith("encoder.blocks.")}
    assert len(blocks) < sum(own.startswith("encoder.blocks.") for own in names)


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"halfseen", "swin", "timm_swin", "mini_swin", "simmim"}))
def test_a_swin_has_a_place_among_swins_alone(name):
    names = {f"encoder.{name}" for name in Swin(SwinConfig(width=8, depths=[1, 1], heads=[1, 1]), 56).state_dict()}
    assert not any(own.startswith("encoder.layers.") for own in LAYOUTS[name].from_ours(names))


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"halfseen", "timm_hierarchical"}))
def test_an_alternet_and_a_pyramid_of_timm_have_no_place_elsewhere(name):
    net = AlterNet(AlterNetConfig(depth="18", width=8, window=2, head_width=4), 64)
    for trunk in (net, TimmTrunk(TimmConfig("pvt_v2_b0", 0.0, dict(PVT)), 64)):
        names = {f"encoder.{own}" for own in trunk.state_dict()}
        assert len(LAYOUTS[name].from_ours(names)) < len(names)


def test_a_hierarchical_trunk_of_timm_has_no_place_in_a_plain_vit():
    names = {f"encoder.{name}" for name in TimmTrunk(TimmConfig("pvt_v2_b0", 0.0, dict(PVT)), 64).state_dict()}
    assert not any(LAYOUTS[name].from_ours(names) for name in ("timm", "mae", "deit"))
