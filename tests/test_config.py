"""Config: what is accepted round-trips; what is wrong is refused with key, value and fix."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from halfseen import optim
from halfseen.config import ConfigError, Data, Model, Optim, Run, duration
from halfseen.finetune.probe_config import Probe
from halfseen.finetune.segment_config import Segment
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import changes, find_recipe, load, recipes, to_yaml


@dataclass
class Small:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


def test_defaults_then_bases_then_recipe_then_overrides(tmp_path):
    (tmp_path / "first.yaml").write_text("model: {size: s, stem: hmlp, depth: 1}\n")
    (tmp_path / "second.yaml").write_text("model: {depth: 2, heads: 3}\n")
    (tmp_path / "recipe.yaml").write_text("base: [first.yaml, second.yaml]\nmodel: {heads: 6}\n")
    config = load(Small, tmp_path / "recipe.yaml", ["model.stem=conv"])
    model = config.model
    assert (model.size, model.stem, model.depth, model.heads) == ("s", "conv", 2, 6)
    assert model.layer_scale is None


def test_a_base_that_includes_itself_is_refused(tmp_path):
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load(Small, tmp_path / "loop.yaml")


def test_resolved_config_reads_back_equal(tmp_path):
    config = load(Small, None, ["data.train=[a,b]", "optim.lr=1e-3", "optim.base_lr=null", "run.images=10M"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(Small, tmp_path / "config.yaml") == config
    assert changes(config)["run.images"] == "10M"
    assert [source.shards for source in config.data.train] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.stem=hmpl", ["model.stem", "hmpl", "hmlp"]),
        ("modle.stem=hmlp", ["modle", "Did you mean: 'model'"]),
        ("data.workers=1.5", ["data.workers", "1.5", "Integer"]),
        ("optim.lr=3", ["optim.lr", "optim.base_lr=null"]),
        ("optim.schedule=steps", ["optim.drops=[]", "set both"]),
        ("optim.drops=[50%]", ["optim.drops=['50%']", "set both"]),
        ("optim.drop=2", ["optim.drop=2.0", "outside [0.0, 1.0]"]),
        ("run.images", ["run.images", "key=value"]),
        ("model.drop_path=1.5", ["model.drop_path", "1.5", "0.99"]),
        ("run.global_batch=0", ["run.global_batch", "0", "> 0"]),
        ("data.train=[{shrds: a}]", ["shrds", "shards"]),
    ],
)
def test_refusals_name_key_value_and_fix(override, words):
    with pytest.raises(ConfigError) as refusal:
        load(Small, None, [override])
    for word in [*words, "fix:"]:
        assert word in str(refusal.value)


def test_a_rate_that_falls_in_steps_has_no_lowest_rate_of_its_own():
    steps = ["optim.schedule=steps", "optim.drops=[50%,700ep]"]
    assert load(Small, None, steps).optim.drops == ["50%", "700ep"]
    with pytest.raises(ConfigError, match=r"optim\.min_lr"):
        load(Small, None, [*steps, "optim.min_lr=1e-5"])
    with pytest.raises(ConfigError, match=r"optim\.drops.*not a duration"):
        load(Small, None, ["optim.schedule=steps", "optim.drops=[soon]"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.betas=[0.9", ["optim.betas='[0.9'", "not YAML"]),
        ("optim.betas=[0.9,1.5]", ["optim.betas=(0.9, 1.5)", "[0, 1)"]),
        ("optim.momentum=-0.1", ["optim.momentum=-0.1", "[0, 1)"]),
        ("optim.eps=-1e-8", ["optim.eps=-1e-08", "not positive"]),
        ("model.registers=-1", ["model.registers=-1"]),
        ("model.mlp_ratio=-1", ["model.mlp_ratio=-1.0"]),
        ("run.seed=18446744073709551616", ["run.seed=18446744073709551616", "outside"]),
        ("augment.std=[0.2,0,0.2]", ["augment.std=(0.2, 0.0, 0.2)", "> 0"]),
        ("augment.mean=[1,2]", ["augment.mean=[1, 2]", "length 3"]),
        ("augment.mean=[1,2,x]", ["augment.mean=", "'x'", "Float"]),
        ("model=3", ["model=3", "is a section", "model.OPTION="]),
        ("model.size.name=b", ["model.size.name='b'", "model.size=VALUE"]),
        ("foo.bar=1", ["foo.bar='1'", "recipes --fields pretrain"]),
        ("data.imagess=1", ["data.imagess='1'", "Did you mean: 'image_size'", "recipes --fields pretrain"]),
        ("data.train.0.weight=9", ["data.train.0.weight='9'", "whole", "data.train='[{shards: A, weight: 9}, B]'"]),
        ("data.train=[{shards: a, weight: x}]", ["data.train=", "'x'", "Float"]),
    ],
)
def test_what_used_to_be_a_traceback_names_key_value_and_fix(override, words):
    with pytest.raises(ConfigError) as refusal:
        load(Pretrain, None, [override])
    for word in [*words, "fix:"]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"base: 3\n", ["base=3"]),
        (b"base:\n", ["base=None"]),
        (b"base: [engine/ddp, 3]\n", ["base=['engine/ddp', 3]"]),
        (b"run: {folder: caf\xe9}\n", ["recipe.yaml", "UTF-8"]),
        (b"data: {imagess: 3}\n", ["data.imagess=3", "recipes --fields pretrain"]),
        (b"model: 3\n", ["model=3", "is a section"]),
        (b"augment: {mean: [1, 2]}\n", ["augment.mean=[1, 2]", "length 3"]),
        (b"data: {workers: many}\n", ["data.workers='many'", "Integer"]),
        (b"- model\n", ["is not a mapping"]),
    ],
)
def test_what_is_wrong_in_a_recipe_names_key_value_and_fix(tmp_path, content, words):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load(Pretrain, tmp_path / "recipe.yaml")
    for word in [*words, "fix:"]:
        assert word in str(refusal.value)


@pytest.mark.parametrize("text", ["1e3", "True", "a: b", "{a,b}-{0..3}", "0x10", "2026-01-01", "[a]", "# a", "'a'", ""])
def test_text_options_keep_the_text_as_typed_and_read_back_equal(tmp_path, text):
    config = load(Small, None, [f"run.folder={text}", f"data.val={text}"])
    assert config.run.folder == config.data.val == text
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(Small, tmp_path / "config.yaml") == config


def test_null_is_none_only_where_none_is_meant():
    config = load(Small, None, ["run.folder=null", "data.val=null", "optim.lr=1e-3", "optim.base_lr=null"])
    assert (config.run.folder, config.data.val, config.optim.lr, config.optim.base_lr) == ("null", None, 1e-3, None)


@pytest.mark.parametrize(
    ("text", "shards"),
    [
        ("1e3", ["1e3"]),
        ("{a,b}-{0..3}.tar", ["{a,b}-{0..3}.tar"]),
        ("pipe: cat a", ["pipe: cat a"]),
        ("[1e3, yes, {shards: 2, weight: 3}]", ["1e3", "yes", "2"]),
        ("{shards: a, weight: 2}", ["a"]),
        ("null", ["null"]),
    ],
)
def test_shards_keep_their_text(text, shards):
    assert [source.shards for source in load(Small, None, [f"data.train={text}"]).data.train] == shards


def test_weights_of_a_mixture_are_numbers():
    sources = load(Small, None, ["data.train=[{shards: a, weight: 2.5}, b]"]).data.train
    assert [source.weight for source in sources] == [2.5, 1.0]


def test_a_recipe_may_leave_a_section_empty_and_name_shards_that_look_like_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model:\ndata: {train: [2012, b]}\n")
    config = load(Small, tmp_path / "recipe.yaml")
    assert config.model == Model()
    assert [source.shards for source in config.data.train] == ["2012", "b"]


@pytest.mark.parametrize(
    ("stage", "option", "off"),
    [
        (Pretrain, "augment.mixup=0.8", "augment.mixup=0.0"),
        (Pretrain, "augment.cutmix=1", "augment.cutmix=0.0"),
        (Pretrain, "augment.erase=0.25", "augment.erase=0.0"),
        (Probe, "augment.randaugment=rand-m9", "augment.randaugment="),
        (Probe, "augment.jitter=0.4", "augment.jitter=0.0"),
        (Segment, "augment.three_augment=true", "augment.three_augment=false"),
        (Segment, "augment.simple_crop=true", "augment.simple_crop=false"),
    ],
)
def test_a_stage_refuses_augmentation_that_it_would_ignore_by_the_options_own_name(stage, option, off):
    labels = ["data.classes=4", "data.label=seg.png" if stage is Segment else "data.label=cls"]
    with pytest.raises(ConfigError) as refusal:
        load(stage, None, [*labels, option])
    assert refusal.value.key == option.partition("=")[0]
    assert refusal.value.fix == f"set {off}"
    load(stage, None, [*labels, option, off])


@pytest.mark.parametrize(
    ("text", "images"),
    [("12800", 12_800), ("500k", 500_000), ("1.5M", 1_500_000), ("3ep", 300), ("5%", 50), ("7 steps", 56), ("0", 0)],
)
def test_durations(text, images):
    assert duration("run.images", text, epoch=100, total=1000, batch=8) == images


@pytest.mark.parametrize("text", ["ten", "10 epochs", "-5", "5ep%"])
def test_bad_durations_are_refused(text):
    with pytest.raises(ConfigError, match=r"run\.images"):
        duration("run.images", text, epoch=100, total=1000, batch=8)


def test_a_unit_without_meaning_is_refused():
    with pytest.raises(ConfigError, match="no meaning here"):
        duration("run.images", "5%")


def test_every_recipe_has_a_line_and_loads():
    from halfseen.finetune.config import Finetune
    from halfseen.pretrain.distill.config import Distill

    listed = recipes()
    assert len(listed) >= 8
    schemas = {"pretrain": Pretrain, "distill": Distill, "finetune": Finetune}
    for name, line in listed:
        assert len(line) > 20, name
        folder = name.split("/")[0]
        if folder in schemas:
            load(schemas[folder], name)


def test_every_stage_recipe_tells_its_command_and_result():
    for name, _ in recipes():
        if name.startswith(("pretrain/", "distill/", "finetune/")):
            head = find_recipe(name).read_text().split("\n\n")[0]
            assert "halfseen" in head, name
            assert name in head, name
            assert "Run here" in head or ("Expected" in head and "Published" in head), name


@pytest.mark.parametrize(
    ("overrides", "eps"),
    [
        ([], 1e-8),
        (["optim.name=lamb"], 1e-6),
        (["optim.name=lamb", "optim.eps=1e-8"], 1e-8),
        (["optim.eps=1e-4"], 1e-4),
    ],
)
def test_epsilon_is_each_optimizers_own_unless_given(overrides, eps):
    weight = nn.Parameter(torch.zeros(2))
    made = optim.build(load(Small, None, overrides).optim, [optim.Group("all", ["weight"])], {"weight": weight})
    assert made.param_groups[0]["eps"] == eps


def test_a_name_that_is_near_nothing_tells_where_the_list_is():
    with pytest.raises(ConfigError) as refusal:
        find_recipe("imagenet")
    assert refusal.value.fix == "`halfseen recipes` lists them", "and no base, such as data/imagenet"
    with pytest.raises(ConfigError, match="data/imagenet"):
        find_recipe("data/imagnet", base=True)


def test_an_unknown_recipe_names_the_near_ones():
    with pytest.raises(ConfigError, match="pretrain/mae_b16"):
        find_recipe("pretrain/mae_b61")
