"""Which engine a config asks for, and what is refused before anything is changed."""

import re
import sys

import pytest
import ranks
from toys import GATHER_ALL, Student, make

from halfseen import config, engine_config, engines
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.engines.deepspeed_options import derive
from halfseen.engines.fsdp import units


def test_auto_on_one_rank_is_single():
    assert make(World(), "auto").name == "single"


def named(world, name):
    return make(world, name).name


def test_auto_on_two_ranks_is_ddp():
    assert ranks.run(named, 2, "auto") == ["ddp", "ddp"]


@pytest.mark.parametrize("name", ["deepspeed", "fairscale"])
def test_a_missing_package_is_named_with_the_alternative(name, monkeypatch):
    for module in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # what importing a package that is not there does
    with pytest.raises(ConfigError, match=f"pip install {name}, or use"):
        make(World(), name)


REFUSED = [
    ("zero1", {"optimizer": {"name": "lamb"}}, r"optim\.name='lamb'.*stage 1"),
    ("zero2", {"optimizer": {"name": "lars"}}, r"optim\.name='lars'.*stage 2"),
    ("zero3", {"optimizer": {"name": "lamb"}}, r"optim\.name='lamb'.*stage 3"),
    ("zero3", {"compile": True}, r"engine\.compile"),
    ("zero0", {"offload": True}, r"engine\.offload"),
    ("zero2", {"shard_size": 2}, r"engine\.shard_size.*option of fsdp"),
    ("oss", {"offload": True}, r"engine\.offload.*option of fsdp and deepspeed"),
    ("ddp", {"offload": True}, r"engine\.offload.*ignored by ddp"),
    ("auto", {"zero_stage": 3}, r"engine\.zero_stage=3.*option of deepspeed"),
    ("zero2", {"fairscale": "sharded"}, r"engine\.fairscale.*option of fairscale"),
    ("ddp", {"reshard": False}, r"engine\.reshard.*option of fsdp and fairscale"),
    ("ddp", {"ema_start": 0.5}, r"engine\.ema_start.*\n.*set engine\.ema"),
    ("ddp", {"ema_ramp": "10k"}, r"engine\.ema_start.*\n.*set engine\.ema"),
    ("ddp", {"offload_activations": True}, r"engine\.offload_activations.*\n.*recompute=true"),
    ("auto", {"gather": "bf16"}, r"engine\.gather.*option of fsdp"),
    ("fsdp", {"gather": "bf16"}, r"engine\.gather.*precision=fp32"),
    ("fsdp", {"extra": "/nowhere.json"}, r"engine\.extra.*option of deepspeed"),
    ("sharded", {"optimizer": {"name": "lamb", "clip": None}}, r"optim\.name='lamb'"),
    ("zero2", {"extra": "/nowhere.json"}, r"engine\.extra='/nowhere\.json'"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_an_engine_cannot_do_is_refused_with_a_way_out(name, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        make(World(), name, **options)
    assert "fix: " in str(error.value)


def test_extra_options_join_ours():
    merged = derive(engine_config.Engine(zero_stage=3, extra=str(GATHER_ALL)))
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert merged["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ('{"gradient_clipping": 1.0}', "gradient_clipping is 1.0, but halfseen sets 0.0"),
        ('{"zero_optimization": {"stage": 1}}', "zero_optimization.stage is 1, but halfseen sets 2"),
        ('{"zero_optimization": 3}', "zero_optimization is 3, but"),
        ('{"optimizer": {"type": "AdamW"}}', "optimizer is halfseen's to decide"),
        ('{"bf16": {"enabled": true}}', "bf16 is halfseen's to decide"),
        ('{"zero_optimization": {"offload_param": {"device": "nvme"}}}', "offload_param is halfseen's"),
        ("[1]", "is not a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_extra_options_that_contradict_ours_are_refused(extra, named, tmp_path):
    path = tmp_path / "extra.json"
    path.write_text(extra)
    with pytest.raises(ConfigError, match=re.escape(named)):
        derive(engine_config.Engine(zero_stage=2, extra=str(path)))


def test_extra_options_that_agree_or_say_auto_pass(tmp_path):
    path = tmp_path / "extra.json"
    path.write_text('{"gradient_clipping": "auto", "zero_optimization": {"stage": 2, "overlap_comm": false}}')
    assert derive(engine_config.Engine(extra=str(path)))["zero_optimization"] == {"stage": 2, "overlap_comm": False}


def test_single_refuses_several_ranks():
    with pytest.raises(ConfigError, match="2 ranks"):
        make(World(world=2), "single")


def test_blocks_that_share_a_weight_are_one_unit():
    student = Student()
    first, second, third = student.blocks()
    assert units(student.blocks(), student) == [[first, third], [second]]
    assert units(Student(tied=False).blocks(), Student(tied=False)) != units(student.blocks(), student)


def test_a_chain_of_shared_weights_is_one_unit():
    student = Student(tied=False)
    first, second, third = student.blocks()
    third.norm, first.grow, second.shrink = second.norm, third.grow, first.shrink
    assert units(student.blocks(), student) == [[first, second, third]]


def test_a_weight_tied_to_the_outside_of_the_blocks_is_refused():
    student = Student(tied=False)
    student.embed.bias = student.layers[1].norm.bias
    with pytest.raises(ConfigError, match=r"embed\.bias"):
        units(student.blocks(), student)


def test_a_module_both_inside_and_outside_of_the_blocks_is_refused():
    student = Student(tied=False)
    student.last = student.layers[1].norm
    with pytest.raises(ConfigError, match=r"last\.weight is also in block 1"):
        units(student.blocks(), student)


def test_a_shard_group_must_divide_the_world():
    cfg = engine_config.Engine(name="fsdp", shard_size=4)
    engines.refuse(cfg, config.Optim(), None)  # a launcher does not know yet
    with pytest.raises(ConfigError, match=r"engine\.shard_size.*\n.*\[1, 2, 3, 6\]"):
        engines.refuse(cfg, config.Optim(), 6)


def unlike(world):
    import torch

    from halfseen import config, engine_config, engines, optim

    torch.manual_seed(world.rank)
    student = Student()
    groups = optim.groups(student, config.Optim())
    with pytest.raises(RuntimeError, match="rank 1 starts from other weights"):
        engines.create(engine_config.Engine(name="fsdp"), student, config.Optim(), groups, world, 0)


def test_sharding_different_weights_is_refused():
    ranks.run(unlike, 2)
