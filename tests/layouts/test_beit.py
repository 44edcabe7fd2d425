"""BEiT's, VQ-KD's and DALL-E's names: official weights go there and back, bit for bit."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from halfseen.config import Model
from halfseen.layouts import LAYOUTS, detect
from halfseen.models import ViT
from halfseen.pretrain.beit2 import BEiT2, BEiT2Config
from halfseen.pretrain.targets.codes import cross_entropy
from halfseen.pretrain.tokenizers import DallE

GOLDEN = Path(__file__).parents[1] / "golden"


def official(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}


@pytest.mark.parametrize(
    ("case", "layout"),
    [("beit_mim_a_shared_rel", "beit"), ("beit_mim_b_abs_perblock", "beit"), ("beit2_clspt_a_sharedhead", "beit2")],
)
def test_official_students_come_back_bit_for_bit(case, layout):
    weights = official(case)
    assert detect(weights).name == layout
    ours = LAYOUTS[layout].take(weights)
    back = LAYOUTS[layout].give(ours)
    assert not any("index" in name for name in ours)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    assert detect(ours).name == "halfseen"


def test_an_official_tokenizer_comes_back_with_what_it_is_made_of():
    weights = official("beit2_vqkd_a")
    assert detect(weights).name == "vqkd"
    back = LAYOUTS["vqkd"].give(LAYOUTS["vqkd"].take(weights))
    idle = {name for name in weights if name.startswith(("teacher", "scaling"))}
    assert back.keys() == weights.keys() - idle
    constant = {"quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted"}
    assert all(torch.equal(back[name], weights[name]) for name in back.keys() - constant)


@pytest.mark.parametrize("own_head", [True, False])
def test_our_student_of_beit2_finds_all_its_weights_again(own_head):
    class Given:
        width = 10
        loss = staticmethod(cross_entropy)

    trunk = ViT(Model(width=16, depth=2, heads=2, patch=8, relative="shared", layer_scale=0.1, key_bias=False), 16)
    student = BEiT2(trunk, BEiT2Config(early=1, shared_head=not own_head), 2, Given())
    weights = student.state_dict()
    theirs = LAYOUTS["beit2"].give(weights)
    assert {"lm_head.weight", "mask_token", "blocks.0.gamma_1", "cls_pt_layers.1.gamma_2"} < theirs.keys()
    assert ("cls_pt_lm_head.weight" in theirs) == own_head
    back = LAYOUTS["beit2"].take(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_timms_beit_has_the_same_names_without_index_tables():
    with torch.device("meta"):
        weights = timm.create_model("beit_base_patch16_224", num_classes=5).state_dict()
    layout = detect(weights)
    assert layout.name == "timm_beit"
    ours = layout.take(weights)
    assert layout.give(ours).keys() == weights.keys()
    assert {"head.weight", "fc_norm.weight", "encoder.blocks.0.ls1.gamma", "encoder.blocks.0.attn.q_bias"} < ours.keys()


def test_a_fine_tuned_head_stays_a_head():
    names = {"encoder.blocks.0.attn.q_bias", "head.weight", "fc_norm.weight"}
    assert set(LAYOUTS["beit"].from_ours(names).values()) == {"blocks.0.attn.q_bias", "head.weight", "fc_norm.weight"}


def test_dalles_names_come_back():
    with torch.device("meta"):
        weights = DallE(width=8, codes=20).state_dict()
    theirs = LAYOUTS["dalle"].give(weights)
    assert detect(theirs).name == "dalle"
    assert LAYOUTS["dalle"].take(theirs).keys() == weights.keys()
    assert len(theirs) == len(weights)


def test_a_discrete_vaes_decoder_is_not_taken_for_simmims_head():
    own = {"encoder.0.0.weight", "codebook.weight", "decoder.0.weight", "decoder.0.bias", "decoder.1.net.0.weight"}
    assert detect(own).name == "halfseen"
    assert detect({"encoder.blocks.0.norm1.weight", "decoder.0.weight", "decoder.0.bias"}).name == "simmim"


def test_a_name_that_no_tokenizer_has_is_kept_and_reported():
    names = {"quantize.embedding.weight", "something.else"}
    assert detect(names).name == "vqkd"
    assert LAYOUTS["vqkd"].to_ours(names)["something.else"] == "something.else"
