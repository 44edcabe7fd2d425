"""What is submitted, refused, stopped and reported; what breaks for good fails at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import drill
import pytest
from drill import RUN, SHORT, THERE, ended, halfseen, hold, losses, resources, waiting

from halfseen.launch import records

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def test_numbers_that_break_end_the_job_at_once_with_the_reason(tmp_path):
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=1, tasks=2, **THERE)
    broken = ["optim.lr=1e30", "engine.skip_budget=1", "engine.rollback_budget=0", "optim.warmup=16"]
    halfseen("launch", "pretrain", *RUN, *broken, f"run.folder={run}", "--launch", file)
    told = ended(run, "failed")
    assert told["code"] == 1
    assert "not finite" in told["reason"]
    assert "halfseen replay" in told["reason"]
    assert drill.starts(run) == 1
    drill.nothing_left(run)
    assert "not finite" in halfseen("status", run)


def test_a_queued_job_runs_the_code_that_was_submitted(tmp_path):
    """The job is held while the source of its checkout is spoilt."""
    checkout = tmp_path / "checkout"
    root = Path(__file__).parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file() and name.split("/")[0] in (
            "halfseen",
            "pretrain",
            "finetune",
            "launch",
            "tools",
            "configs",
        ):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, checkout / name)
    for name in ("pretrain", "finetune", "launch", "tools", "configs"):
        (checkout / "halfseen" / name).symlink_to(f"../{name}")
    subprocess.run(["git", "init", "--quiet", checkout], check=True)
    file = resources(tmp_path, nodes=1, tasks=1, sbatch={"hold": "true"}, python="")
    run = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    given = [*SHORT, f"run.folder={run}", "--launch", file]
    halfseen("launch", "pretrain", *given, cwd=checkout, env=environment)
    (checkout / "pretrain/train.py").write_text("raise SystemExit('the edited source ran')\n")
    subprocess.run(["scontrol", "release", records.story(run).job], check=True)
    ended(run, "complete")
    code = Path(records.story(run).starts[0]["code"])
    assert code.parent == tmp_path / ".code"
    assert "edited" not in (code / "halfseen/pretrain/train.py").read_text()


def test_a_job_can_launch_another(tmp_path):
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=2, tasks=1, **THERE)
    words = [sys.executable, "-m", "halfseen", "launch", "pretrain", *SHORT, f"run.folder={run}", "--launch", str(file)]
    command = " ".join(f"'{word}'" for word in words)
    outer = ["sbatch", "--wait", "--ntasks=3", "--exclude=node1,node2", f"--output={tmp_path}/outer.log"]
    done = subprocess.run([*outer, f"--wrap={command}"], timeout=drill.PATIENCE, check=False)
    assert done.returncode == 0, (tmp_path / "outer.log").read_text()
    ended(run, "complete")
    assert json.loads((run / "receipt.json").read_text())["starts"][0]["topology"]["world"] == 2


def test_stop_saves_and_launch_goes_on(tmp_path):
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=1, tasks=2, held=48, **THERE)
    given = [*SHORT, "run.checkpoint_every=100%", f"run.folder={run}", "--launch", file]
    halfseen("launch", "pretrain", *given)
    waiting(run, 1, 48)
    assert "is running for it" in halfseen("launch", "pretrain", *given, code=2)
    assert "asked to save" in halfseen("stop", run)
    assert ended(run, "stopped")["position"] == 48
    assert "run it again" in halfseen("logs", run)
    hold(tmp_path)
    halfseen("launch", "pretrain", *given)
    assert ended(run, "complete")["position"] == 160
    assert sorted(losses(run)) == list(range(16, 161, 16))


@pytest.mark.parametrize(
    ("options", "key", "fix"),
    [
        (["launch.partition=gpus"], "launch.partition", "sinfo"),
        (["launch.gpus_per_node=8", "engine.device=cuda"], "launch.gpus_per_node", "GPUs"),
        (["launch.nodes=9", "run.global_batch=36"], "launch.nodes", "sinfo"),
        (["run.folder=/dev/shm/halfseen-drill"], "run.folder", "shared file system"),
        (["run.folder=/proc/halfseen-drill"], "run.folder", "shared disk of yours"),
        (["run.global_batch=18"], "run.global_batch", "multiple of 4"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_queued(options, key, fix, tmp_path):
    file = resources(tmp_path)
    said = halfseen("launch", "pretrain", *SHORT, f"run.folder={tmp_path / 'run'}", *options, "--launch", file, code=2)
    assert f"error: {key}=" in said
    assert fix in said
    assert str(tmp_path) not in drill.queue()
    shutil.rmtree("/dev/shm/halfseen-drill", ignore_errors=True)


def test_a_dead_dependency_is_refused(tmp_path):
    file = resources(tmp_path)
    given = [*SHORT, f"run.folder={tmp_path / 'run'}", "--launch", file, "--after", "999999999"]
    assert "launch that stage again first" in halfseen("launch", "pretrain", *given, code=2)


def test_the_plain_batch_script_needs_no_submitit(tmp_path):
    """It survives the same: here a requeue by its own hand, after USR2."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=2, tasks=1, held=48, **THERE)
    script = halfseen("launch", "pretrain", *SHORT, f"run.folder={run}", "--launch", file, "--print-sbatch")
    assert "submitit" not in script
    (tmp_path / "job.sh").write_text(script)
    job = subprocess.run(
        ["sbatch", "--parsable", tmp_path / "job.sh"], capture_output=True, text=True, check=True
    ).stdout.strip()
    waiting(run, 1, 48)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    drill.left(run, 1)
    hold(tmp_path)
    assert ended(run, "complete")["position"] == 160
    assert drill.starts(run) == 2


def test_a_job_reports_what_the_nodes_have(tmp_path):
    said = halfseen("launch", "nodes", "--launch", resources(tmp_path, tasks=1, **THERE), "--wait", cwd=tmp_path)
    assert "complete" in said
    rows = json.loads((tmp_path / "runs/nodes/nodes.json").read_text())
    assert [row["host"] for row in rows] == ["node3", "node4"]
    assert all(row["all_reduce_gb_s"] > 0 for row in rows)
    assert all(row["file_seconds"] is not None and row["signal_seconds"] is not None for row in rows)
    assert "USR2 reaches every rank" in halfseen("logs", tmp_path / "runs/nodes")
