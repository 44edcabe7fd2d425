"""What a cluster does to a run, and that the run is the same run after it."""

import json
import subprocess

import drill
import pytest
from drill import HERE, IMAGES, RUN, THERE, ended, halfseen, hold, losses, resources, sequence, torchrun, until, waiting

from halfseen.launch import records

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cluster):
    """The run that nothing interrupts: four ranks under torchrun."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    drill.finish(torchrun(folder, *RUN))
    found = losses(folder)
    assert sorted(found) == list(range(16, IMAGES + 1, 16))
    keys = sequence(folder.parent, "run-keys")
    assert sorted(keys) == list(range(IMAGES))
    return found, keys


@pytest.mark.long
def test_a_time_limit_costs_no_image(reference, tmp_path):
    """USR2 comes before the limit, at times while the ranks still start; the job saves and requeues itself."""
    run = tmp_path / "run"
    file = resources(tmp_path, nodes=2, tasks=1, held=320, minutes=2, save_seconds=40, fruitless=9, **THERE)
    halfseen("launch", "pretrain", *RUN, f"run.folder={run}", "--launch", file)
    until("320 images, saved on request", lambda: any(end["position"] == 320 for end in drill.ends(run)), run)
    hold(tmp_path)
    ended(run, "complete")
    position = 0
    for event in records.events(run)[1:]:
        assert event["position"] >= position if event["event"] == "ended" else event["position"] == position
        position = event["position"]
    assert {end["verdict"] for end in drill.ends(run)} == {"requeue", "complete"}
    drill.same_run(run, *reference, rel=2e-6)
    drill.nothing_left(run)


@pytest.mark.long
def test_one_run_survives_preemption_requeue_a_killed_rank_and_a_lost_node(reference, tmp_path):
    """Five starts of one run, the last one on half the nodes."""
    run = tmp_path / "run"
    file = resources(tmp_path, held=80, min_nodes=1, **HERE)
    halfseen("launch", "pretrain", *RUN, f"run.folder={run}", "--launch", file)
    job = records.story(run).job
    waiting(run, 1, 80)
    drill.occupy("node1,node2")  # preemption: USR2, saved, requeued
    drill.left(run, 1)
    hold(tmp_path, 160)
    waiting(run, 2, 160)
    subprocess.run(["scontrol", "requeue", job], check=True)  # SIGTERM, then SIGKILL
    until("start 3", lambda: drill.starts(run) >= 3, run)
    hold(tmp_path, 240)
    waiting(run, 3, 240)
    drill.kill_rank(job, 3)
    hold(tmp_path, 400)  # the others go on, into a step that rank 3 will not join
    waiting(run, 4, 400)
    drill.node("crash", "node2")  # no word from it any more
    hold(tmp_path)
    until("start 5", lambda: drill.starts(run) >= 5, run)
    drill.node("revive", "node2")
    assert ended(run, "complete")["position"] == IMAGES
    told = records.story(run)
    assert told.job == job
    assert len(told.starts) == 5
    assert [event["position"] % 16 for event in told.starts] == [0] * 5
    assert [event["position"] for event in told.starts[:2]] == [0, 80]  # preempted: nothing was lost
    hosts = [start["topology"]["hosts"] for start in json.loads((run / "receipt.json").read_text())["starts"]]
    assert hosts[:4] == [["node1", "node2"]] * 4
    assert hosts[4] == ["node1"]
    drill.same_run(run, *reference, rel=2e-6)  # another number of ranks sums in another order
    drill.nothing_left(run)
    shown = halfseen("status", run)
    assert "complete" in shown
    assert f"{IMAGES:,} of {IMAGES:,} (100%)" in shown
