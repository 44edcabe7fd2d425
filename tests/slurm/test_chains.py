"""Chains and sweeps: dependencies through preemption, failure and a site that cancels."""

import json
import shutil
import subprocess

import drill
import pytest
from drill import HERE, SHORT, THERE, ended, halfseen, hold, resources, until, waiting

from halfseen.launch import records

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


@pytest.mark.long
def test_a_chain_goes_through_a_preemption_and_continues_after_a_failure(tmp_path):
    """Pretrain, fine-tune, evaluate; the fine-tuning cannot write at first, so the evaluation is cancelled."""
    base = tmp_path / "chain"
    file = resources(tmp_path, nodes=2, tasks=1, held=80, **HERE)
    chain = tmp_path / "chain.yaml"
    tiny = ["model.width=32", "model.depth=2", "model.heads=2", "data.image_size=32", "run.images=320"]
    stages = {
        "pretrain": {"recipe": "pretrain/demo", "set": SHORT[1:]},
        "finetune": {"recipe": "finetune/demo", "set": [*tiny, "run.init=${pretrain}", "task.train=attention"]},
        "evaluate": {"run": "${finetune}", "launch": {"nodes": 1, "min_nodes": None}},
    }
    chain.write_text(json.dumps({"folder": str(base), "launch": str(file), "stages": stages}))
    said = halfseen("launch", "chain", chain)
    assert "after pretrain" in said
    (base / "finetune/checkpoints").write_text("not a folder")  # any earlier, and the launch is refused
    waiting(base / "pretrain", 1, 80)
    drill.occupy("node1,node2")
    drill.left(base / "pretrain", 1)
    hold(tmp_path)
    ended(base / "pretrain", "complete")
    assert drill.starts(base / "pretrain") == 2
    told = ended(base / "finetune", "failed")
    assert "checkpoints" in told["reason"]
    assert drill.starts(base / "finetune") == 1  # another one would end the same
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


def test_a_chain_through_a_teacher_s_stored_answers(tmp_path):
    """Fine-tune a teacher, keep its answers, distil from them, evaluate: a job each, on two nodes."""
    base = tmp_path / "chain"
    file = resources(tmp_path, nodes=2, tasks=1, **THERE)
    chain = tmp_path / "chain.yaml"
    tiny = ["model.width=32", "model.depth=2", "model.heads=2", "data.image_size=32", "run.images=320"]
    learned = ["distillation.student_layers=[0]", "distillation.teacher_layers=[1]", "teacher.source=${teacher}"]
    stages = {
        "teacher": {"stage": "finetune", "recipe": "finetune/demo", "set": tiny},
        "teach": {"recipe": "distill/demo", "set": [*tiny, *learned, "store.shard_images=256"]},
        "distill": {
            "recipe": "distill/demo",
            "set": [*tiny, *learned, "store.folder=${teach}", "store.shard_images=256"],
        },
        "evaluate": {"run": "${distill}", "launch": {"nodes": 1}},
    }
    chain.write_text(json.dumps({"folder": str(base), "launch": str(file), "stages": stages}))
    assert "after teacher, teach" in halfseen("launch", "chain", chain)
    for name in stages:
        ended(base / name, "complete")
        assert drill.starts(base / name) == 1
    assert len(list((base / "teach").glob("positions-*.tar"))) == 2  # a shard from each node
    assert "320 of 320 (100%)" in halfseen("status", base / "teach")
    assert records.story(base / "distill").ended["position"] == 320
    assert json.loads((base / "evaluate/result.json").read_text())["images"] == 394


def test_a_sweep_with_a_failing_member_has_a_complete_table(tmp_path):
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
    shutil.rmtree(base / "001")  # with another rate it is another run
    (tmp_path / "sweep.yaml").write_text("grid: {optim.lr: [1e-3, 5e-4, 2e-3]}")
    again = halfseen("launch", "pretrain", *SHORT, *budget, "--launch", file, "--sweep", tmp_path / "sweep.yaml")
    assert "1 members to run, 2 are complete" in again
    ended(base / "001", "complete")
    until("the table", lambda: (base / "results.csv").read_text().count(",complete,160,") == 3)


def test_a_cluster_that_cancels_gets_a_new_job(tmp_path):
    """Partition `fragile` ends preempted jobs for good, here a sweep's; what waited for them waits for the new ones."""
    base = tmp_path / "sweep"
    file = resources(tmp_path, nodes=1, tasks=1, held=80, partition="fragile", sbatch={"nodelist": "node1"})
    (tmp_path / "sweep.yaml").write_text("grid: {run.seed: [0, 1]}")
    given = [*SHORT, f"run.folder={base}", "--launch", file, "--sweep", tmp_path / "sweep.yaml"]
    halfseen("launch", "pretrain", *given)
    members = [base / "000", base / "001"]
    array = records.story(members[0]).job.partition("_")[0]
    wait = ["sbatch", "--parsable", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--wrap=true"]
    made = subprocess.run([*wait, "--output=/dev/null"], capture_output=True, text=True, check=True)
    for run in members:
        waiting(run, 1, 80)
    drill.occupy("node1")
    for run in members:
        drill.left(run, 1)
    hold(tmp_path)
    for run in members:
        ended(run, "complete")
        assert records.story(run).job.partition("_")[0] != array
        assert [start["position"] for start in records.story(run).starts] == [0, 80]
    until("the dependent job", lambda: "JobState=COMPLETED" in drill.show(made.stdout.strip()))
    until("the table", lambda: (base / "results.csv").read_text().count(",complete,160,") == 2)
