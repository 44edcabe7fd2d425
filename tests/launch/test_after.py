"""What follows an end: complete, again in the same job, again in a new one, or a reason and no more."""

import json

import pytest

from halfseen.launch import after, records, slurm
from halfseen.launch.after import decide


def verdict(code, state="RUNNING", **more):
    known = {"stop": False, "why": "", "fruitless": 1, "budget": 3, "requeue": "auto"}
    return decide(code, state, **known | more)


@pytest.mark.parametrize("code", [75, 124, 134, 137, 143, 70])
def test_what_another_start_can_heal_is_requeued(code):
    assert verdict(code).word == "requeue"


@pytest.mark.parametrize("code", [1, 2])
def test_numbers_data_and_options_fail_at_once_with_the_reason(code):
    found = verdict(code, why="12 updates were not finite\nmore")
    assert (found.word, found.reason) == ("failed", "12 updates were not finite")


def test_a_complete_run_is_complete_whatever_slurm_thinks():
    assert verdict(0, "TIMEOUT").word == "complete"


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "NODE_FAIL"])
def test_what_slurm_or_a_person_ended_stays_ended(state):
    assert verdict(75, state).word == "left"


@pytest.mark.parametrize("state", ["PENDING", "REQUEUED"])
def test_what_is_queued_already_is_left_alone(state):
    assert verdict(75, state).word == "left"


@pytest.mark.parametrize("state", ["PREEMPTED", "TIMEOUT", "OUT_OF_MEMORY"])
def test_what_slurm_cut_gets_a_new_job(state):
    assert verdict(75, state).word == "resubmit"


def test_the_config_chooses_how_to_start_again():
    assert verdict(75, requeue="resubmit").word == "resubmit"
    assert verdict(75, requeue="never").word == "failed"


def test_the_budget_counts_starts_without_progress_not_restarts():
    assert verdict(137, fruitless=2).word == "requeue"
    found = verdict(137, fruitless=3)  # the budget
    assert found.word == "failed"
    assert "3 starts in a row brought no newer checkpoint" in found.reason
    assert "SIGKILL" in found.reason


def test_a_stop_is_final_unless_the_run_was_complete():
    assert verdict(75, stop=True).word == "stopped"
    assert verdict(0, stop=True).word == "complete"


@pytest.mark.parametrize(
    ("told", "code"),
    [((2, "a=1: is wrong"), 2), ((None, ""), 70)],
)
def test_only_a_rank_s_word_is_final(told, code):
    """srun ends with 1 as well where a node does not answer: other nodes may."""
    found, why = after.cause(1, *told)
    assert found == code
    assert why
    assert after.cause(137, None, "") == (137, "")


@pytest.fixture
def member(tmp_path, monkeypatch):
    """The last member of a job array, which Slurm gives the array's own number; what is asked of Slurm is kept."""
    base = tmp_path / "sweep"
    folder = base / "001"
    records.where(folder).mkdir(parents=True)
    (records.where(folder) / "launch.yaml").write_text("minutes: 5\n")
    records.where(base).mkdir()
    (records.where(base) / "array-ab.json").write_text(json.dumps([str(base / "000"), str(folder)]))
    (records.where(base) / "sweep.json").write_text(json.dumps({"members": [{"folder": "001", "set": []}]}))
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    asked = []
    monkeypatch.setattr(slurm, "fate", lambda job, restarts: asked.append(("fate", job)) or "RUNNING")
    monkeypatch.setattr(slurm, "requeue", lambda job: asked.append(("requeue", job)) or "")
    records.add(folder, "queued", job="7_1", cluster="slurm")
    records.add(folder, "started", attempt="7_1", position=0)
    return base, asked


def test_starts_in_which_no_rank_came_to_life_count(tmp_path, monkeypatch):
    """srun refuses an argument, a container is missing: three starts, not requeues for ever."""
    records.add(tmp_path, "queued", job="7", cluster="slurm")
    (records.where(tmp_path) / "launch.yaml").write_text("fruitless: 3\n")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "fate", lambda job, restarts: "RUNNING")
    monkeypatch.setattr(slurm, "requeue", lambda job: "")
    for restart, word in enumerate(("requeue", "requeue", "failed")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        after.main(["255", str(tmp_path)])
        assert records.story(tmp_path).ended["verdict"] == word
    assert "3 starts in a row" in records.story(tmp_path).ended["reason"]


def test_a_member_of_an_array_requeues_itself_and_no_other(member):
    base, asked = member
    assert after.main(["75", str(base), "ab"]) == 75
    assert asked == [("fate", "7_1"), ("requeue", "7_1")]
    assert records.story(base / "001").ended["verdict"] == "requeue"


def test_a_member_that_goes_on_as_a_job_of_its_own_still_fills_the_table(member, monkeypatch):
    base, asked = member
    moved = []
    monkeypatch.setattr(slurm, "fate", lambda job, restarts: "PREEMPTED")
    monkeypatch.setattr(slurm, "follow", lambda old, new: moved.append((old, new)))
    monkeypatch.setattr("halfseen.launch.submit.resubmit", lambda folder, job: "8")
    after.main(["75", str(base), "ab"])
    assert moved == [("7_1", "8")]
    assert asked == []
    records.add(base / "001", "queued", job="8", cluster="slurm", again=True)
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert after.main(["0", str(base / "001")]) == 0
    assert "001,complete" in (base / "results.csv").read_text()
