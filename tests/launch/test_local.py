"""Launching without Slurm: on this machine, and in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfseen.launch import records

TINY = [
    "pretrain/demo",
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "objective.mae.decoder_width=32",
    "objective.mae.decoder_depth=1",
    "data.image_size=32",
    "data.workers=0",
    "run.images=64",
    "run.global_batch=16",
    "run.picture_every=0",
]


def launch(*arguments, code=0, **more):
    program = [sys.executable, "-m", "halfseen", "launch", "pretrain", *TINY, "--launch", "launch/local", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_ranks_here_run_the_snapshot_to_the_end(tmp_path):
    run = tmp_path / "run"
    said = launch(f"run.folder={run}", "--wait", cwd=tmp_path)  # Python 3.10 cannot from inside a checkout
    assert "complete" in said
    told = records.story(run)
    assert told.complete
    assert told.ended["position"] == 64
    first = json.loads((run / "receipt.json").read_text())["starts"][0]
    assert first["topology"]["world"] == 2
    code = told.starts[0]["code"]
    if code:  # a checkout: the receipt knows its commit although the copy has no git
        assert Path(code).parent == tmp_path / ".code"
        assert first["source"] == json.loads((Path(code) / "snapshot.json").read_text())
    assert not list((run / "launch").glob("meeting-*"))


def test_a_dry_run_queues_nothing(tmp_path):
    said = launch(f"run.folder={tmp_path / 'run'}", "--dry-run")
    assert "64 images = 4 steps" in said
    assert "2 ranks x 1 micro-batches x 8" in said
    assert records.story(tmp_path / "run").job == ""


@pytest.mark.parametrize(
    ("options", "key", "fix"),
    [
        (["launch.tasks_per_node=3"], "run.global_batch", "use a multiple of 3"),
        (["launch.gpus_per_node=64"], "launch.gpus_per_node", "use launch.gpus_per_node="),
        (["launch.gpu_memory_gib=0.0000001"], "launch.gpu_memory_gib", "shard them"),
        (["data.train=/nowhere"], "data.train", ""),
        (["run.keep=1000000000000"], "run.keep", "lower it"),
        (["launch.python=/nowhere/python"], "launch.python", "name one the nodes have"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(options, key, fix, tmp_path, capsys):
    from halfseen.config import ConfigError
    from halfseen.launch import command

    with pytest.raises(ConfigError) as refused:
        command.main(["pretrain", *TINY, f"run.folder={tmp_path / 'run'}", *options, "--launch", "launch/local"])
    assert refused.value.key == key
    assert fix in refused.value.fix
    assert records.story(tmp_path / "run").job == ""


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "launch"])
def test_a_folder_that_cannot_be_written_is_refused_whichever_it_is(name, tmp_path):
    from halfseen.config import ConfigError
    from halfseen.launch import command

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("not a folder")
    with pytest.raises(ConfigError, match=f"{name} cannot be written: File exists") as refused:
        command.main(["pretrain", *TINY, f"run.folder={tmp_path / 'run'}", "--launch", "launch/local"])
    assert refused.value.key == "run.folder"


def test_a_stage_that_is_none_is_refused(tmp_path):
    from halfseen.config import ConfigError
    from halfseen.launch import command

    with pytest.raises(ConfigError, match="nothing that can be launched"):
        command.main(["shards", "--launch", "launch/local"])


def test_data_of_which_every_sample_looked_at_is_bad_is_refused(tmp_path):
    from halfseen.config import ConfigError
    from halfseen.launch import command

    unlabelled = ["finetune/demo", "data.label=txt", f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"member \.txt is missing") as refused:
        command.main(["finetune", *unlabelled, "--launch", "launch/local", "--dry-run"])
    assert refused.value.key == "data.train"


def test_an_evaluation_of_nothing_is_refused_and_leaves_no_folder(tmp_path):
    from halfseen.config import ConfigError
    from halfseen.launch import command

    with pytest.raises(ConfigError, match="no such run"):
        command.main(["evaluate", str(tmp_path / "run"), "--launch", "launch/local"])
    assert not list(tmp_path.iterdir())


def test_an_evaluation_takes_the_options_of_evaluate(tmp_path, monkeypatch):
    from halfseen.launch import command

    monkeypatch.setattr(command, "start", lambda task, launch, after: started.append(task) or "7")
    started = []
    run = str(tmp_path)
    assert command.main(["evaluate", run, "data.val=a", "--launch", "launch/local", "--", "--batch", "8", "--ema"]) == 0
    assert started[0].arguments[:5] == (run, "data.val=a", "--batch", "8", "--ema")


def test_debug_runs_in_this_process_with_its_exit_code(tmp_path):
    one = ["launch.cluster=debug", "launch.tasks_per_node=1", f"run.folder={tmp_path / 'run'}"]
    assert "complete" in launch(*one)
    assert records.story(tmp_path / "run").complete
    assert "nothing is left to do" in launch(*one)
    assert len(records.story(tmp_path / "run").starts) == 1


def test_a_sweep_here_goes_on_after_a_member_that_failed_and_refuses_another_meaning_of_one(tmp_path):
    """In this process: two members, of which the first cannot go on; then the file has another value for the second."""
    (tmp_path / "s.yaml").write_text("grid: {optim.lr: [1e30, 1e-3]}")
    here = ["launch.cluster=debug", "launch.tasks_per_node=1", f"run.folder={tmp_path / 'sweep'}"]
    budget = ["engine.skip_budget=0", "engine.rollback_budget=0", "optim.warmup=16"]
    said = launch(*here, *budget, "--sweep", str(tmp_path / "s.yaml"), "--wait", code=1)
    assert "2 members to run" in said
    _, first, second = (tmp_path / "sweep/results.csv").read_text().splitlines()
    assert first.startswith("000,1e30,failed,")
    assert second.startswith("001,1e-3,complete,64,")
    assert "1 members to run, 1 are complete" in launch(
        *here, *budget, "--sweep", str(tmp_path / "s.yaml"), "--dry-run"
    )
    (tmp_path / "s.yaml").write_text("grid: {optim.lr: [1e-2, 2e-2]}")
    assert "shapes the curve" in launch(*here, *budget, "--sweep", str(tmp_path / "s.yaml"), code=2)
    assert "001,1e-3,complete" in (tmp_path / "sweep/results.csv").read_text()
