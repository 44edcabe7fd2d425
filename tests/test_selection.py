"""What trains is chosen by module type: the right tensors, before the first forward, and nothing else moves."""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from halfseen import engines, lora, optim, selection
from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError, Model, Optim
from halfseen.distributed import World
from halfseen.engine_config import Engine
from halfseen.models import ViT

PARTS = ["attention", "mlp", "head", "norms", "bias", "last:1", "lora", "attention+norms"]
SMALL = {"size": "ti", "width": 32, "depth": 3, "heads": 2, "patch": 8, "layer_scale": 0.1}


def make(task=None, **model):
    torch.manual_seed(0)
    return Classifier(ViT(Model(**{**SMALL, **model}), 16), task or Task(), 5)


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(count, 5, generator=generator).softmax(1)
    return {"image": torch.randn(count, 3, 16, 16, generator=generator), "target": target}


def trained(student):
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("size", "total", "numbers"),
    [("s", 22_205_416, 7_702_504), ("b", 86_877_160, 29_559_784), ("l", 304_763_880, 102_376_424)],
)
def test_attention_only_of_deit_at_384_has_the_published_size(size, total, numbers):
    with torch.device("meta"):
        trunk = ViT(Model(size=size, layer_scale=1e-4, position_on_class=False), 384)
        chosen = Classifier(trunk, Task(pool="class", train="attention"), 1000).selection
    assert selection.count(chosen.trained) == numbers
    assert selection.count(chosen.trained) + selection.count(chosen.frozen) == total


def test_every_attention_of_a_parallel_block_trains_and_the_official_switch_trains_the_first_alone():
    student = make(Task(pool="class", train="attention"), parallel=2)
    assert {name.split(".")[4] for name in trained(student) if ".attns." in name} == {"0", "1"}
    strict = make(Task(pool="class", train="attention", strict_official=True), parallel=2)
    assert not [name for name in trained(strict) if ".attns.1." in name]
    assert [name for name in trained(strict) if ".attns.0.attn.qkv" in name]
    assert trained(strict) < trained(student)


def test_the_table_trains_or_not_and_a_fixed_one_never():
    assert "encoder.pos_embed" in trained(make(Task(train="attention")))
    assert "encoder.pos_embed" not in trained(make(Task(train="attention", train_positions=False)))
    for train in ("all", "attention"):
        assert "encoder.pos_embed" not in trained(make(Task(train=train), position="sincos"))


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_relative_tables_train_with_the_attention(relative):
    names = trained(make(Task(train="attention"), relative=relative, key_bias=False))
    tables = [name for name in names if name.endswith("relative_position_bias_table")]
    assert len(tables) == (1 if relative == "shared" else 3)
    assert sum(name.endswith(("q_bias", "v_bias")) for name in names) == 6


def test_every_attention_in_a_trunk_is_known():
    kinds = get_args(get_type_hints(Model)["attention"])
    every = [{"attention": kind, "class_token": kind in ("softmax", "reattention")} for kind in kinds]
    every += [{"parallel": 2}, {"share": 3}, {"relative": "block"}, {"head_mixing": "linear"}, {"irpe": "product"}]
    for model in every:
        trunk = make(**model).encoder
        blocks = [name for name, _ in trunk.named_modules() if name.rpartition(".")[2] == "attn"]
        known = [name for name, module in trunk.named_modules() if isinstance(module, selection.ATTENTIONS)]
        assert blocks
        assert set(blocks) <= set(known), f"{model}: an attention of a type that selection.py does not know"
        norms = [name for name, module in trunk.named_modules() if "norm" in name and not list(module.children())]
        assert all(isinstance(trunk.get_submodule(name), (*selection.NORMS, nn.Identity)) for name in norms)


@pytest.mark.parametrize(
    "model", [{"norm": "power"}, {"attention": "reattention"}, {"stem": "hmlp", "stem_norm": "batch"}]
)
def test_statistics_of_frozen_norms_do_not_move(model):
    student = make(Task(pool="class", train="mlp", train_positions=False), **model).train()
    before = {name: value.clone() for name, value in student.named_buffers()}
    assert before
    student(batch())["loss"].backward()
    assert all(torch.equal(before[name], value) for name, value in student.named_buffers())


@pytest.mark.parametrize("part", PARTS)
def test_each_part_trains_its_own_tensors_and_the_head(part):
    names = trained(make(Task(pool="class", train=part)))
    assert {"head.weight", "head.bias"} <= names
    inside = {name for name in names if name.startswith("encoder.")} - {"encoder.pos_embed"}
    rule = {
        "attention": lambda name: ".attn." in name,
        "mlp": lambda name: ".mlp." in name,
        "head": lambda name: False,
        "norms": lambda name: "norm" in name,
        "bias": lambda name: name.endswith("bias"),
        "last:1": lambda name: name.startswith(("encoder.blocks.2.", "encoder.norm.")),
        "lora": lambda name: "lora_" in name,
        "attention+norms": lambda name: ".attn." in name or "norm" in name,
    }[part]
    every = {name for name, _ in make(Task(pool="class", train=part)).named_parameters() if name.startswith("encoder.")}
    assert inside == {name for name in every if rule(name)}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_tensors_are_the_same_bits_after_training_and_have_no_state(part):
    student = make(Task(pool="class", train=part, head_std=0.2), stem="hmlp", stem_norm="batch", drop_path=0.1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    names = trained(student)
    cfg = Optim(lr=0.01, base_lr=None, layer_decay=0.7)
    groups = optim.groups(student, cfg, student.layer_of, student.layers())
    engine = engines.create(Engine(ema=0.9), student, cfg, groups, World(), 0)
    for position in range(0, 12, 4):
        engine.step([batch()], 0.01, position)
    after = student.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved - {name for name in after if "running_" in name or "num_batches" in name} == names
    if part not in ("norms", "attention+norms", "bias"):  # those train the stem's BatchNorm itself
        assert moved == names, "statistics of a frozen BatchNorm must not move"
    assert {key.split(".", 1)[1].rsplit(".", 1)[0] for key in engine.state() if key.startswith("optim.")} == names
    assert set(engine.average) == names


def test_a_wrong_part_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'atention' is no part of a student(.|\n)*attention"):
        selection.check("task.train", "atention")
    with pytest.raises(ConfigError, match="whole answers"):
        selection.check("task.train", "all+norms")
    with pytest.raises(ConfigError, match="the trunk has 3 blocks"):
        make(Task(train="last:4"))
    with pytest.raises(ConfigError, match="no choice called norms"):
        Task(train="norms", strict_official=True).check("task")
    with pytest.raises(ConfigError, match="no MLP is frozen"):
        Task(recompute_mlp=True).check("task")


def test_the_lists_are_printed_and_written(tmp_path):
    chosen = make(Task(pool="class", train="attention")).selection
    chosen.write(tmp_path / "trained.json")
    content = json.loads((tmp_path / "trained.json").read_text())
    assert content["trained"]["names"] == list(chosen.trained)
    assert content["trained"]["bytes"] == 4 * content["trained"]["numbers"]
    assert not set(content["trained"]["names"]) & set(content["frozen"]["names"])
    assert f"{len(chosen.trained)} of {len(chosen.trained) + len(chosen.frozen)} tensors" in str(chosen)


def test_flops_count_what_is_not_computed():
    """Attention-only skips the weight gradients of MLPs; what lies before the first trained block has no backward."""
    flops = {part: make(Task(pool="class", train=part)).train_flops_per_image() for part in ("all", *PARTS)}
    student = make(Task(pool="class"))
    weights = sum(p.numel() for name, p in student.named_parameters() if ".mlp." in name and p.ndim > 1)
    tokens = student.encoder.tokens + student.encoder.prefix
    assert flops["all"] - flops["attention"] == pytest.approx(2 * tokens * weights)
    assert flops["head"] < flops["last:1"] < flops["norms"] < flops["all"]


# ------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    "model", [{}, {"relative": "block"}, {"relative": "shared", "key_bias": False}, {"parallel": 2}]
)
def test_low_rank_maps_change_nothing_at_first_then_every_attention_and_can_be_merged(model):
    plain, adapted = make(Task(head_std=0.2), **model), make(Task(train="lora", head_std=0.2), **model)
    missing = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.rpartition(".")[2] in (lora.DOWN, lora.UP) for name in missing.missing_keys)
    assert not missing.unexpected_keys
    given = batch()
    plain.eval()
    adapted.eval()
    before = plain(given)["loss"]
    assert torch.equal(adapted(given)["loss"], before)
    for module in adapted.modules():
        if isinstance(module, lora.Adapted):
            nn.init.normal_(module.lora_up, std=0.1)
    changed = adapted(given)
    changed["loss"].backward()
    for name, parameter in adapted.named_parameters():
        if name.rpartition(".")[2] in (lora.DOWN, lora.UP):
            assert parameter.grad.abs().max() > 0, f"{name} is not used"
    plain.load_state_dict(lora.merge(adapted.state_dict(), 16.0 / 8))
    torch.testing.assert_close(plain(given)["loss"], changed["loss"].detach(), rtol=1e-5, atol=1e-6)
    assert (plain(given)["loss"] - before).abs() > 1e-4
