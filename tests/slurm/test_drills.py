"""Drills on a real Slurm of virtual nodes: what a cluster does to a run, and that the run is the same run after it.

Jobs on node1 and node2 are interrupted; the others share node3 and node4 meanwhile. Times were measured on two cores
that other work kept busy (load average 6 to 13); an idle machine is faster.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import drill
import pytest
import torch
from drill import TINY, ended, halfseen, losses, resources, sequence, stepping, torchrun, until

from halfseen.checkpoint import read_weights
from halfseen.launch import records

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]

IMAGES = 1600
RUN = [*TINY, f"run.images={IMAGES}", "run.checkpoint_every=160"]
SHORT = [*TINY, "run.images=160", "run.checkpoint_every=80"]

HERE = {"sbatch": {"exclude": "node3,node4"}}  # node1 and node2: where things go wrong
THERE = {"sbatch": {"exclude": "node1,node2"}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cluster):
    """The run that nothing interrupts: four ranks under torchrun."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    drill.finish(torchrun(folder, *RUN))
    found = losses(folder)
    assert sorted(found) == list(range(16, IMAGES + 1, 16))
    keys = sequence(folder.parent, "run-keys")
    assert sorted(keys) == list(range(IMAGES))
    return folder, found, keys


@pytest.fixture(scope="module")
def short_limit(tmp_path_factory, cluster):
    """A run that needs several of its two-minute starts: begun first, looked at last."""
    folder = tmp_path_factory.mktemp("limit")
    file = resources(folder, nodes=2, tasks=1, pace=0.6, minutes=2, save_seconds=70, fruitless=9, **THERE)
    halfseen("launch", "pretrain", *RUN, f"run.folder={folder / 'run'}", "--launch", file)
    return folder / "run"


def same_run(run, reference, rel):
    """The curve and the images of an interrupted run are those of the uninterrupted one."""
    _, expected, keys = reference
    found = losses(run)
    assert sorted(found) == sorted(expected)
    for position, loss in expected.items():
        assert found[position] == pytest.approx(loss, rel=rel), position
    assert sequence(run.parent) == keys


def nothing_left(run):
    """No process of the run's job is alive."""
    job = records.story(run).job
    deadline = time.monotonic() + 60
    while drill.processes(job) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [drill.command_of(process) for process in drill.processes(job)]


@pytest.mark.long
def test_one_run_survives_preemption_requeue_a_killed_rank_and_a_lost_node(short_limit, reference, tmp_path):
    """250 s, and 70 s before it for the run under torchrun. Five starts of one run, the last one on half the nodes."""
    run = tmp_path / "run"
    file = resources(tmp_path, pace=0.1, min_nodes=1, **HERE)
    halfseen("launch", "pretrain", *RUN, f"run.folder={run}", "--launch", file)
    job = records.story(run).job
    stepping(run, 1)
    drill.occupy("node1,node2")  # preemption: USR2, saved, requeued
    stepping(run, 2)
    subprocess.run(["scontrol", "requeue", job], check=True)  # SIGTERM, then SIGKILL
    stepping(run, 3)
    drill.kill_rank(job, 3)
    stepping(run, 4)
    drill.node("crash", "node2")  # no word from it any more
    stepping(run, 5)
    drill.node("revive", "node2")
    assert ended(run, "complete")["position"] == IMAGES
    told = records.story(run)
    assert told.job == job
    assert len(told.starts) == 5
    assert [event["position"] % 16 for event in told.starts] == [0] * 5
    assert told.starts[1]["position"] > 0  # preempted: nothing was lost
    hosts = [start["topology"]["hosts"] for start in json.loads((run / "receipt.json").read_text())["starts"]]
    assert hosts[:4] == [["node1", "node2"]] * 4
    assert hosts[4] == ["node1"]
    same_run(run, reference, rel=2e-6)  # another number of ranks sums in another order
    nothing_left(run)
    shown = halfseen("status", run)
    assert "complete" in shown
    assert f"{IMAGES:,} of {IMAGES:,} (100%)" in shown


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_final_weights_are_those_of_torchrun(engine, tmp_path, three):
    """210 s for all three and their torchrun. They run at once on the same nodes: ports and folders do not meet."""
    ours, theirs = three[engine]
    ended(ours, "complete")
    assert losses(ours) == losses(theirs)
    expected = read_weights(theirs)
    found = read_weights(ours)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    nothing_left(ours)


@pytest.fixture(scope="module")
def three(tmp_path_factory, cluster):
    """The same short run under three engines, on 2 nodes x 2 ranks and under torchrun."""
    folder = tmp_path_factory.mktemp("engines")
    made = {}
    for engine in ("ddp", "fsdp", "deepspeed"):
        file = resources(folder / engine, **THERE)
        run = folder / engine / "run"
        halfseen("launch", "pretrain", *SHORT, f"engine.name={engine}", f"run.folder={run}", "--launch", file)
        made[engine] = (run, folder / engine / "torchrun")
    for engine, (_, theirs) in made.items():
        drill.finish(torchrun(theirs, *SHORT, engine=engine))
    return made


def test_numbers_that_break_end_the_job_at_once_with_the_reason(tmp_path):
    """12 s."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=1, tasks=2, **THERE)
    broken = ["optim.lr=1e30", "engine.skip_budget=1", "engine.rollback_budget=0", "optim.warmup=16"]
    halfseen("launch", "pretrain", *RUN, *broken, f"run.folder={run}", "--launch", file)
    told = ended(run, "failed")
    assert told["code"] == 1
    assert "not finite" in told["reason"]
    assert "halfseen replay" in told["reason"]
    assert drill.starts(run) == 1
    nothing_left(run)
    assert "not finite" in halfseen("status", run)


@pytest.mark.long
def test_a_chain_goes_through_a_preemption_and_continues_after_a_failure(tmp_path):
    """130 s. Pretrain, fine-tune, evaluate; the fine-tuning cannot write at first, so the evaluation is cancelled."""
    base = tmp_path / "chain"
    file = resources(tmp_path, nodes=2, tasks=1, pace=0.2, **HERE)
    chain = tmp_path / "chain.yaml"
    tiny = ["model.width=32", "model.depth=2", "model.heads=2", "data.image_size=32", "run.images=320"]
    stages = {
        "pretrain": {"recipe": "pretrain/demo", "set": [*SHORT[1:], "run.images=640"]},
        "finetune": {"recipe": "finetune/demo", "set": [*tiny, "run.init=${pretrain}", "task.train=attention"]},
        "evaluate": {"run": "${finetune}", "launch": {"nodes": 1, "min_nodes": None}},
    }
    chain.write_text(json.dumps({"folder": str(base), "launch": str(file), "stages": stages}))
    (base / "finetune").mkdir(parents=True)
    (base / "finetune/checkpoints").write_text("not a folder")
    said = halfseen("launch", "chain", chain)
    assert "after pretrain" in said
    stepping(base / "pretrain", 1)
    drill.occupy("node1,node2")
    ended(base / "pretrain", "complete")
    assert drill.starts(base / "pretrain") == 2
    told = ended(base / "finetune", "failed")
    assert "checkpoints" in told["reason"]
    evaluation = base / "evaluate"
    until("the evaluation is cancelled", lambda: "cancelled" in halfseen("status", evaluation))
    assert drill.starts(evaluation) == 0
    (base / "finetune/checkpoints").unlink()
    again = halfseen("launch", "chain", chain)
    assert "pretrain     complete" in again
    assert "finetune     again; before: " in again
    ended(base / "finetune", "complete")
    ended(evaluation, "complete")
    assert json.loads((evaluation / "result.json").read_text())["images"] == 394
    assert "evaluate     complete" in halfseen("launch", "chain", chain)


def test_a_sweep_with_a_failing_member_has_a_complete_table(tmp_path):
    """14 s."""
    base = tmp_path / "sweep"
    file = resources(tmp_path, nodes=1, tasks=1, parallel=2, **THERE)
    (tmp_path / "sweep.yaml").write_text("grid: {optim.lr: [1e-3, 1e30, 2e-3]}")
    budget = ["engine.skip_budget=0", "engine.rollback_budget=0", "optim.warmup=16", f"run.folder={base}"]
    said = halfseen("launch", "pretrain", *SHORT, *budget, "--launch", file, "--sweep", tmp_path / "sweep.yaml")
    assert "3 members to run" in said
    verdicts = [until(f"member {n}", lambda n=n: drill.final(base / f"{n:03d}"))["verdict"] for n in range(3)]
    assert verdicts == ["complete", "failed", "complete"]

    def whole():
        rows = (base / "results.csv").read_text().splitlines() if (base / "results.csv").exists() else []
        return rows if len(rows) == 4 and "running" not in "".join(rows) and "queued" not in "".join(rows) else None

    head, first, second, third = until("the table", whole)
    assert head.startswith("member,optim.lr,state,images,loss")
    assert first.startswith("000,1e-3,complete,160,")
    assert second.startswith("001,1e30,failed,")
    assert "not finite" in second
    assert third.startswith("002,2e-3,complete,160,")


def test_a_queued_job_runs_the_code_that_was_submitted(tmp_path):
    """25 s. The job is held while the source of its checkout is spoilt."""
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
    """25 s."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=2, tasks=1, **THERE)
    words = [sys.executable, "-m", "halfseen", "launch", "pretrain", *SHORT, f"run.folder={run}", "--launch", str(file)]
    command = " ".join(f"'{word}'" for word in words)
    outer = ["sbatch", "--wait", "--ntasks=3", "--exclude=node1,node2", f"--output={tmp_path}/outer.log"]
    done = subprocess.run([*outer, f"--wrap={command}"], timeout=drill.PATIENCE, check=False)
    assert done.returncode == 0, (tmp_path / "outer.log").read_text()
    ended(run, "complete")
    assert json.loads((run / "receipt.json").read_text())["starts"][0]["topology"]["world"] == 2


def test_a_cluster_that_cancels_gets_a_new_job(tmp_path):
    """43 s. Partition `fragile` ends a preempted job for good; whoever waited for it waits for its successor."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=1, tasks=1, pace=0.5, partition="fragile", sbatch={"nodelist": "node1"})
    halfseen("launch", "pretrain", *SHORT, "run.images=480", f"run.folder={run}", "--launch", file)
    first = records.story(run).job
    dependent = subprocess.run(
        ["sbatch", "--parsable", f"--dependency=afterok:{first}", "--output=/dev/null", "--wrap=true"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    stepping(run, 1)
    drill.occupy("node1")
    ended(run, "complete")
    told = records.story(run)
    assert told.job != first
    assert len(told.starts) == 2
    until("the dependent job", lambda: "JobState=COMPLETED" in show(dependent))


def show(job):
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout


def test_stop_saves_and_launch_goes_on(tmp_path):
    """57 s."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=1, tasks=2, pace=1.0, **THERE)
    given = [*SHORT, "run.images=480", "run.checkpoint_every=100%", f"run.folder={run}", "--launch", file]
    halfseen("launch", "pretrain", *given)
    stepping(run, 1)
    assert "is running for it" in halfseen("launch", "pretrain", *given, code=2)
    assert "asked to save" in halfseen("stop", run)
    assert ended(run, "stopped")["position"] >= 32
    assert "run it again" in halfseen("logs", run)
    halfseen("launch", "pretrain", *given)
    assert ended(run, "complete")["position"] == 480
    assert sorted(losses(run)) == list(range(16, 481, 16))


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
    """4 to 9 s each."""
    file = resources(tmp_path)
    said = halfseen("launch", "pretrain", *SHORT, f"run.folder={tmp_path / 'run'}", *options, "--launch", file, code=2)
    assert f"error: {key}=" in said
    assert fix in said
    assert str(tmp_path) not in drill.queue()
    shutil.rmtree("/dev/shm/halfseen-drill", ignore_errors=True)


def test_a_dead_dependency_is_refused(tmp_path):
    """6 s."""
    file = resources(tmp_path)
    given = [*SHORT, f"run.folder={tmp_path / 'run'}", "--launch", file, "--after", "999999999"]
    assert "launch that stage again first" in halfseen("launch", "pretrain", *given, code=2)


def test_the_plain_batch_script_needs_no_submitit(tmp_path):
    """40 s. It survives the same: here a requeue by its own hand, after USR2."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=2, tasks=1, pace=0.5, **THERE)
    script = halfseen("launch", "pretrain", *SHORT, f"run.folder={run}", "--launch", file, "--print-sbatch")
    assert "submitit" not in script
    (tmp_path / "job.sh").write_text(script)
    job = subprocess.run(
        ["sbatch", "--parsable", tmp_path / "job.sh"], capture_output=True, text=True, check=True
    ).stdout.strip()
    stepping(run, 1)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert ended(run, "complete")["position"] == 160
    assert drill.starts(run) == 2


def test_a_job_reports_what_the_nodes_have(tmp_path):
    """5 s."""
    said = halfseen("launch", "nodes", "--launch", resources(tmp_path, tasks=1, **THERE), "--wait", cwd=tmp_path)
    assert "complete" in said
    rows = json.loads((tmp_path / "runs/nodes/nodes.json").read_text())
    assert [row["host"] for row in rows] == ["node3", "node4"]
    assert all(row["all_reduce_gb_s"] > 0 for row in rows)
    assert all(row["file_seconds"] is not None and row["signal_seconds"] is not None for row in rows)
    assert "USR2 reaches every rank" in halfseen("logs", tmp_path / "runs/nodes")


@pytest.mark.long
def test_a_time_limit_costs_no_image(short_limit, reference):
    """About 300 s, beside the other drills. USR2 comes before the limit; the job saves and requeues itself."""
    run = short_limit
    ended(run, "complete")
    told = records.story(run)
    assert len(told.starts) >= 2
    saved = [event for event in records.events(run) if event["event"] == "ended" and event["verdict"] == "requeue"]
    assert [start["position"] for start in told.starts[1:]] == [event["position"] for event in saved]
    assert all("saved" in reason for reason in told.reasons)
    same_run(run, reference, rel=2e-6)
    nothing_left(run)
