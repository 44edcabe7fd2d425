"""Name tables: every official checkpoint of the reference cases goes there and back, bit for bit."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from halfseen.config import ConfigError, Model
from halfseen.layouts import LAYOUTS, detect, rename
from halfseen.models import ViT

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "mae_pretrain_a": "mae",
    "mae_train_steps_a": "mae",
    "mae_finetune_a_cls": "mae",
    "mae_finetune_b_gap": "mae",
    "deit_v2_a_layerscale": "deit",
    "deit_v2_b_parallel_ls_hmlp": "deit",
    "deit_hmlp_stem_a": "deit_stem",
    "deepvit_reattn_a": "deepvit",
    "cpvt_v2_a": "cpvt",
    "peg_a": "peg",
    "hdvw_attention2d_b_k2_mask": "hdvw",
    "hdvw_alternet_block_a": "hdvw",
    "hdvw_convit_a": "hdvw_convit",
}


def official(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}


def there_and_back(weights, layout):
    ours = layout.take(weights)
    return ours, layout.give(ours)


@pytest.mark.parametrize(("case", "layout"), CASES.items())
def test_official_weights_come_back_bit_for_bit(case, layout):
    weights = official(case)
    _, back = there_and_back(weights, LAYOUTS[layout])
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    "model",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch16_18x2_224",
        "vit_base_patch16_reg4_gap_256",
    ],
)
def test_timms_names_are_ours_and_come_back(model):
    with torch.device("meta"):
        weights = timm.create_model(model, num_classes=5).state_dict()
    ours, back = there_and_back(weights, LAYOUTS["timm"])
    assert back.keys() == weights.keys()
    assert {name for name in ours if not name.startswith("encoder.")} == {
        name for name in weights if name.startswith(("head", "fc_norm"))
    }


@pytest.mark.parametrize("layout", ["mae", "deit", "timm"])
@pytest.mark.parametrize("parts", [{}, {"layer_scale": 0.1}, {"parallel": 2, "layer_scale": 0.1}, {"parallel": 2}])
def test_our_trunk_comes_back_from_every_layout(layout, parts):
    trunk = ViT(Model(width=16, depth=11, heads=2, patch=16, stem="hmlp", **parts), 32)
    weights = {f"encoder.{name}": value for name, value in trunk.state_dict().items()}
    theirs = LAYOUTS[layout].give(weights)
    back = LAYOUTS[layout].take(theirs)
    assert len(theirs) == len(weights)
    assert back.keys() == weights.keys()


def test_deits_second_branch_has_deits_names():
    names = LAYOUTS["deit"].from_ours(
        {
            "encoder.blocks.10.attns.0.norm.weight",
            "encoder.blocks.10.attns.1.norm.weight",
            "encoder.blocks.10.attns.1.attn.qkv.bias",
            "encoder.blocks.10.attns.1.ls.gamma",
            "encoder.blocks.10.ffns.1.norm.bias",
            "encoder.blocks.10.ffns.1.mlp.fc2.weight",
            "encoder.blocks.10.ffns.0.ls.gamma",
        }
    )
    assert set(names.values()) == {
        "blocks.10.norm1.weight",
        "blocks.10.norm11.weight",
        "blocks.10.attn1.qkv.bias",
        "blocks.10.gamma_1_1",
        "blocks.10.norm21.bias",
        "blocks.10.mlp1.fc2.weight",
        "blocks.10.gamma_2",
    }


def test_deit_has_no_name_for_a_third_branch():
    with pytest.raises(ConfigError, match="at most two branches"):
        LAYOUTS["deit"].from_ours({"encoder.blocks.0.attns.2.norm.weight"})


@pytest.mark.parametrize("layout", ["deit", "timm", "beit", "timm_beit", "swin", "mini_deit", "hdvw_convit"])
def test_a_decoder_has_no_place_where_there_is_none(layout):
    names = {"encoder.norm.weight", "decoder.embed.weight"}
    assert LAYOUTS[layout].from_ours(names).keys() <= {"encoder.norm.weight"}


@pytest.mark.parametrize("layout", ["mae", "deit", "timm", "beit", "transformers_vit", "transformers_beit"])
def test_blocks_that_stand_for_several_have_no_place_where_each_stands_for_itself(layout):
    names = {"encoder.blocks.0.norm1.weight", "encoder.blocks.1.norm1.0.weight", "encoder.blocks.1.norm1.1.weight"}
    assert LAYOUTS[layout].from_ours(names).keys() == {"encoder.blocks.0.norm1.weight"}


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("mae_pretrain_a", "mae"),
        ("mae_finetune_a_cls", "timm"),  # the same names
        ("deit_v2_a_layerscale", "deit"),
        ("deit_v2_b_parallel_ls_hmlp", "deit"),
        ("deit_hmlp_stem_a", "deit_stem"),
    ],
)
def test_the_layout_of_official_weights_is_found_out(case, found):
    weights = official(case)
    assert detect(weights).name == found
    ours = detect(weights).take(weights)
    assert detect(ours).name == "halfseen"
    expected = LAYOUTS[CASES[case]].take(weights)
    assert ours.keys() == expected.keys()


def test_two_weights_never_become_one():
    with pytest.raises(ValueError, match="would both be called"):
        rename({"a": torch.zeros(1), "b": torch.ones(1)}, {"a": "c", "b": "c"})


def test_timm_gets_a_trunk_and_a_classifier_and_nothing_else():
    trunk, classifier = (
        {"encoder.cls_token": "cls_token"},
        {"head.weight": "head.weight", "fc_norm.bias": "fc_norm.bias"},
    )
    table = LAYOUTS["timm"].from_ours
    assert table({*trunk, *classifier, "decoder.norm.bias"}) == trunk | classifier
    pretrained = {"mask_token", "head.weight", "aggregation.norm.bias", "quantizer.codebook"}
    assert table({*trunk, *pretrained}) == trunk


@pytest.mark.parametrize("layout", ["mae", "deit", "timm"])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"relative": "block", "key_bias": False}, ("relative_position_bias_table", "q_bias", "v_bias")),
        ({"relative": "shared"}, ("rel_pos_bias",)),
        ({"irpe": "product", "irpe_on": "qkv"}, ("rpe_q", "rpe_k", "rpe_v")),
        ({"head_mixing": "linear"}, ("proj_l", "proj_w")),
        ({"attention": "reattention"}, ("reattention",)),
        ({"peg": 1}, ("peg",)),
    ],
)
def test_what_a_plain_vit_lacks_has_no_place_there_and_all_else_has(layout, options, parts):
    with torch.device("meta"):
        trunk = ViT(Model(width=32, depth=2, heads=2, patch=8, **options), 16)
    names = {f"encoder.{name}" for name in trunk.state_dict()}
    lost = names - LAYOUTS[layout].from_ours(names).keys()
    beyond = {name for name in names if any(part in name for part in parts)}
    assert beyond
    assert lost == beyond
