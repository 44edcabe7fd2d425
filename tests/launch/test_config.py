"""Resources: ranges, combinations, and what halfseen sets itself."""

import pytest

from halfseen.config import ConfigError
from halfseen.launch import command
from halfseen.launch.config import Launch
from halfseen.recipes import load, recipe_root, to_yaml


@pytest.mark.parametrize("name", ["slurm", "cpu", "local"])
def test_bundled_resources_are_valid(name):
    assert load(Launch, recipe_root() / "launch" / f"{name}.yaml").nodes >= 1


def test_resources_survive_a_round_trip(tmp_path):
    (tmp_path / "a.yaml").write_text("sbatch: {mail-type: END}\nsetup: [module load cuda, 'export A=1']\nnodes: 3\n")
    first = load(Launch, tmp_path / "a.yaml", ["srun_args=[--cpu-bind=cores]", "min_nodes=2"])
    (tmp_path / "b.yaml").write_text(to_yaml(first))
    assert load(Launch, tmp_path / "b.yaml") == first
    assert first.sbatch == {"mail-type": "END"}
    assert first.srun_args == ["--cpu-bind=cores"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["nodes=0"], "nodes"),
        (["min_nodes=3", "nodes=2"], "min_nodes"),
        (["cluster=local", "nodes=2"], "nodes"),
        (["cluster=debug", "tasks_per_node=2"], "tasks_per_node"),
        (["minutes=1", "save_seconds=60"], "save_seconds"),
        (["sbatch={signal: USR1}"], "sbatch.signal"),
        (["sbatch={--no_requeue: 'true'}"], "sbatch.--no_requeue"),
        (["sbatch={'Mail Type': END}"], "sbatch.Mail Type"),
        (["fruitless=0"], "fruitless"),
        (["nods=2"], "nods"),
    ],
)
def test_what_cannot_be_is_refused(options, key):
    with pytest.raises(ConfigError) as refused:
        load(Launch, None, options)
    assert refused.value.key == key
    assert refused.value.fix


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nofile", "no such file"), ("launch/chain", "is a chain"), ("pretrain/demo", "is the recipe of a stage")],
)
def test_what_holds_no_resources_is_refused_with_those_that_do(name, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        command.main(["pretrain", "pretrain/demo", "--launch", name])
    assert refused.value.key == "--launch"
    assert "launch/cpu, launch/local, launch/slurm" in refused.value.fix
    assert "pretrain/" not in refused.value.fix


def test_a_refused_resource_is_named_as_the_command_line_has_it():
    with pytest.raises(ConfigError) as refused:
        command.main(["pretrain", "pretrain/demo", "--launch", "launch/local", "launch.minutes=0"])
    assert refused.value.key == "launch.minutes"


def test_ranks_follow_gpus_and_every_possible_world_is_known():
    assert load(Launch, None, ["gpus_per_node=8"]).tasks == 8
    assert load(Launch, None, ["gpus_per_node=8", "tasks_per_node=1"]).tasks == 1
    assert load(Launch, None, ["nodes=3", "min_nodes=1", "gpus_per_node=2"]).worlds == [6, 4, 2]
    assert load(Launch).worlds == [1]


def test_what_the_environment_has_for_sbatch_stands_in_for_open_options(monkeypatch, tmp_path):
    for name, value in {"ACCOUNT": "vision", "PARTITION": "gpu", "TIMELIMIT": "5"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    monkeypatch.delenv("SBATCH_QOS", raising=False)
    found, _ = command.resources("launch/cpu", ["launch.partition=debug"])
    assert (found.account, found.partition, found.qos, found.minutes) == ("vision", "debug", "", 60)
    assert command.resources("launch/local", [])[0].account == ""
