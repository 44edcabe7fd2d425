"""The batch scripts: what every one of them must say."""

import subprocess
import sys

import pytest

from halfseen.launch import submit
from halfseen.launch.config import Launch
from halfseen.launch.task import Task
from halfseen.recipes import load


@pytest.fixture
def srun(tmp_path, monkeypatch):
    """A PATH on which submitit believes in a Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def task(tmp_path, **more):
    return Task("pretrain", str(tmp_path / "my run"), "stage: pretrain\n", **more)


OPTIONS = [
    "nodes=2",
    "gpus_per_node=8",
    "cpus_per_task=12",
    "memory_gib=100",
    "minutes=90",
    "save_seconds=200",
    "partition=gpu",
    "account=vision",
    "qos=high",
    "constraint=h200",
    "exclusive=true",
    "sbatch={mail-type: END, overcommit: 'true'}",
    "setup=[module load cuda]",
    "srun_args=[--container-image=a.sqsh]",
    "interface=ib0",
]


@pytest.mark.parametrize("plain", [False, True])
def test_both_scripts_ask_for_the_same_and_survive_the_same(plain, tmp_path, srun):
    launch = load(Launch, None, OPTIONS)
    text = submit.plain_script(task(tmp_path), launch) if plain else submit.script(task(tmp_path), launch)
    flags = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    expected = {
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=12",
        "time=90",
        "signal=USR2@200",
        "partition=gpu",
        "account=vision",
        "qos=high",
        "constraint=h200",
        "exclusive",
        "requeue",
        "kill-on-invalid-dep=yes",
        "open-mode=append",
        "mail-type=END",
        "overcommit",
    }
    assert expected <= flags
    assert {"mem=100GB", "mem=102400M"} & flags
    assert any(flag.startswith("output=") and "%j" in flag and "%A" not in flag for flag in flags)
    lines = text.splitlines()
    run = next(number for number, line in enumerate(lines) if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in lines[run]
    assert "--container-image=a.sqsh" in lines[run]
    above, below = "\n".join(lines[:run]), "\n".join(lines[run + 1 :])
    for line in ("module load cuda", "export SRUN_CPUS_PER_TASK=12", "export NCCL_SOCKET_IFNAME=ib0", "trap : TERM"):
        assert line in above
    assert "code=$?\ntrap '' TERM\nexec " in below
    assert 'halfseen.launch.after "$code" \'' in below
    assert ("submitit" in text) is not plain
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_snapshot_comes_before_the_current_folder(tmp_path, srun):
    text = submit.script(task(tmp_path, code="/shared/.code/ab"), load(Launch))
    assert 'export PYTHONSAFEPATH=1 PYTHONPATH=/shared/.code/ab"${PYTHONPATH:+:$PYTHONPATH}"' in text


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (["python=/nodes/bin/python3"], False),
        (["python=python3 -X dev"], False),
        (["python=python3", "srun_args=[--container-image=a.sqsh]"], True),
        (["python=apptainer exec --nv a.sif python3"], True),
    ],
)
def test_the_end_of_the_script_runs_outside_a_container_where_slurm_s_commands_are(options, ours, tmp_path, srun):
    launch = load(Launch, None, options)
    for text in (submit.plain_script(task(tmp_path), launch), submit.script(task(tmp_path), launch)):
        end = next(line for line in text.splitlines() if line.startswith("exec "))
        assert end.startswith(f"exec {sys.executable if ours else launch.python} -m halfseen.launch.after ")
        assert f" {launch.python} -" in next(line for line in text.splitlines() if line.startswith("srun "))


@pytest.mark.parametrize("flag", ["gres=gpu:h100:8", "gpus-per-node=h100:8"])
def test_gpus_of_one_type_are_asked_for_once(flag, tmp_path, srun):
    """Slurm refuses GPUs with and without a type in one job."""
    name, _, value = flag.partition("=")
    launch = load(Launch, None, ["gpus_per_node=8", f"sbatch={{{name}: '{value}'}}"])
    assert launch.tasks == 8
    for text in (submit.plain_script(task(tmp_path), launch), submit.script(task(tmp_path), launch)):
        assert [line for line in text.splitlines() if line.startswith("#SBATCH --g")] == [f"#SBATCH --{flag}"]


def test_all_members_of_a_sweep_run_at_once_unless_the_config_says_fewer(tmp_path, srun):
    for parallel, expected in ((0, "0-999%1000"), (4, "0-999%4")):
        made = submit.executor(task(tmp_path), Launch(parallel=parallel))._executor
        made.parameters["map_count"] = 1000  # as submitit does for an array
        assert f"#SBATCH --array={expected}\n" in made._make_submission_file_text("", "")


@pytest.mark.parametrize("plain", [False, True])
def test_a_job_that_may_shrink_leaves_the_number_of_tasks_to_srun(plain, tmp_path, srun):
    launch = load(Launch, None, ["nodes=4", "min_nodes=2", "gpus_per_node=8", "cpus_per_task=3"])
    text = submit.plain_script(task(tmp_path), launch) if plain else submit.script(task(tmp_path), launch)
    assert "#SBATCH --nodes=2-4\n" in text
    assert "#SBATCH --mincpus=24\n" in text
    assert "--ntasks" not in text
    assert "export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * 8)) SLURM_NTASKS_PER_NODE=8\n" in text


def test_a_dependency_is_passed_on(tmp_path, srun):
    assert "#SBATCH --dependency=afterok:1:2" in submit.script(task(tmp_path), load(Launch), "afterok:1:2")


def test_a_task_is_text_and_comes_back_whole(tmp_path):
    made = task(tmp_path, code="/c", total=10)
    made.save()
    assert Task.read(made.folder) == made
    assert made.config_file.read_text() == "stage: pretrain\n"
    other = Task("pretrain", made.folder, "stage: pretrain\nrun: {seed: 1}\n")
    other.save()
    assert other.config_file != made.config_file
    assert made.config_file.exists()  # a queued job keeps its own


def test_a_job_s_folder_is_refused_to_another_launch(tmp_path, monkeypatch):
    from halfseen.config import ConfigError
    from halfseen.launch import jobs, records, slurm

    records.add(tmp_path, "queued", job="7", cluster="slurm")
    monkeypatch.setattr(slurm, "states", lambda jobs: {"7": "PENDING"})
    with pytest.raises(ConfigError, match="job 7 is pending for it"):
        jobs.refuse_active(tmp_path)
    monkeypatch.setattr(slurm, "states", lambda jobs: {"7": "COMPLETED"})
    jobs.refuse_active(tmp_path)


def test_a_task_says_what_was_stated_and_no_defaults(tmp_path):
    """What nobody states may be taken from run.init, which a chain makes only later."""
    from halfseen.finetune.config import Finetune
    from halfseen.launch import command
    from halfseen.recipes import load

    given = ["optim.lr=1e-3", "optim.betas=[0.9,0.99]", f"run.folder={tmp_path / 'run'}", "data.train=[a,b]"]
    options = command.config_text(Finetune, ["finetune/demo", *given])
    assert {"model.width", "optim.lr", "data.train"} <= options.keys()
    assert "model.norm" not in options
    (tmp_path / "config.yaml").write_text(command.nested_yaml(options))
    assert load(Finetune, tmp_path / "config.yaml") == load(Finetune, "finetune/demo", given)
