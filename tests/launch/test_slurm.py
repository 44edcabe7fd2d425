"""Slurm's answers become options to correct; its variables stay with the job they belong to."""

import os
import subprocess

import pytest

from halfseen.config import ConfigError
from halfseen.launch import slurm


@pytest.mark.parametrize(
    ("said", "key"),
    [
        (
            "sbatch: error: invalid partition specified: gpus\nsbatch: error: Batch job submission failed",
            "launch.partition",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination",
            "launch.account",
        ),
        ("allocation failure: Requested node configuration is not available", "launch.nodes"),
        (
            "sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification",
            "launch.gpus_per_node",
        ),
        ("sbatch: error: Batch job submission failed: Job dependency problem", "--after"),
        (
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
            "(job submit limit, user's size and/or time limits)",
            "launch.qos",
        ),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", "--sweep"),
        ("sbatch: fatal: Could not establish a configuration source", "launch.cluster"),
        ("something new", "launch"),
        ("", "launch"),
    ],
)
def test_a_refusal_names_the_option(said, key):
    refused = slurm.refusal(said)
    assert refused.key == key
    assert refused.fix
    assert "sbatch: error" not in refused.reason


def test_a_job_inside_a_job_inherits_nothing_but_where_the_cluster_is(monkeypatch):
    inside = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "8",
        "SRUN_CPUS_PER_TASK": "2",
        "RANK": "3",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    for name, value in (inside | {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/home/a"}).items():
        monkeypatch.setenv(name, value)
    with slurm.outside_job():
        assert not inside.keys() & os.environ.keys()
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
        assert os.environ["HOME"] == "/home/a"
    assert inside.items() <= os.environ.items()


def test_no_slurm_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch on PATH"):
        slurm.refuse_absent()
    assert slurm.states(["7"]) == {}


@pytest.fixture
def fake(monkeypatch):
    """Answers instead of a cluster: command word -> (exit code, output); the commands asked are kept."""
    asked, answers = [], {}

    def ask(*command, text=None):
        asked.append(command)
        code, output = answers.get(command[0], (0, ""))
        return subprocess.CompletedProcess(command, code, output, output if code else "")

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm, "present", lambda: True)
    return asked, answers


def test_states_know_jobs_and_array_members(fake):
    fake[1]["squeue"] = (0, "7|7|RUNNING\n9_0|9|PENDING\n9_1|10|RUNNING\n")
    assert slurm.states(["7", "9_1"]) == {
        "7": "RUNNING",
        "9_0": "PENDING",
        "9": "PENDING",
        "9_1": "RUNNING",
        "10": "RUNNING",
    }


@pytest.fixture
def pending(monkeypatch):
    """Waiting jobs and for whom: what squeue shows and scontrol changes. Array 7 has members 0, 1 and 2."""
    jobs = {}

    def ask(*command, text=None):
        output = ""
        if command[0] == "scontrol":
            jobs[command[2].removeprefix("JobId=")] = command[3].removeprefix("Dependency=") + "(unfulfilled)"
        elif "--array" in command:
            output = "7_0\n7_1\n7_2\n"
        else:
            output = "".join(f"{job}|{waits}\n" for job, waits in jobs.items())
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    return jobs


@pytest.mark.parametrize(
    ("waits", "after"),
    [
        ("afterok:7(unfulfilled)", "afterok:8"),
        ("afterok:77(unfulfilled)", "afterok:77"),
        ("afterok:6:7(unfulfilled)", "afterok:6:8"),
        ("afterok:7_1(unfulfilled)", "afterok:7_1"),
    ],
)
def test_whoever_waited_for_the_old_job_waits_for_the_new_one(pending, waits, after):
    pending |= {"11": waits, "8": "afterany:7(unfulfilled)"}
    slurm.follow("7", "8")
    assert pending["11"].removesuffix("(unfulfilled)") == after
    assert pending["8"] == "afterany:7(unfulfilled)"


@pytest.mark.parametrize(
    ("waits", "after"),
    [
        ("afterok:7_*(unfulfilled)", "afterok:7_0:7_2:8"),
        ("afterok:7_1(unfulfilled)", "afterok:8"),
        ("afterok:6:7_*(unfulfilled)", "afterok:6:7_0:7_2:8"),
        ("afterok:77_*(unfulfilled)", "afterok:77_*"),
        ("afterok:7_10(unfulfilled)", "afterok:7_10"),
    ],
)
def test_whoever_waited_for_a_whole_array_waits_for_the_rest_of_it_and_the_new_job(pending, waits, after):
    pending["11"] = waits
    slurm.follow("7_1", "8")
    assert pending["11"].removesuffix("(unfulfilled)") == after


def test_two_members_that_move_at_once_lose_neither_change(pending, monkeypatch):
    pending["11"] = "afterok:7_*(unfulfilled)"
    others = ["afterok:7_1:7_2:9(unfulfilled)", None]  # member 0 writes what it made of the old line over ours, once

    def interfere(seconds):
        pending["11"] = (others.pop(0) if others else None) or pending["11"]

    monkeypatch.setattr(slurm.time, "sleep", interfere)
    slurm.follow("7_1", "8")
    assert pending["11"] == "afterok:8:7_2:9(unfulfilled)"


def test_a_dependent_that_cannot_be_moved_is_said(fake, monkeypatch):
    monkeypatch.setattr(slurm, "waiting", lambda: {"11": "afterok:7"})
    fake[1]["scontrol"] = (1, "Job update not available right now")
    with pytest.raises(OSError, match="job 11 does not wait for 8"):
        slurm.follow("7", "8")


def test_a_requeue_cannot_be_ended_by_its_own_effect(fake):
    assert slurm.requeue("7") == ""
    shell, flag, script, job = fake[0][0]
    assert (shell, flag, job) == ("sh", "-c", "7")
    assert 'trap "" TERM' in script
    fake[1]["sh"] = (1, "slurm_requeue error: Requested operation is presently disabled")
    assert "presently disabled" in slurm.requeue("7")


@pytest.mark.parametrize(
    ("shown", "fate"),
    [
        ("JobId=7 JobState=RUNNING Reason=None Restarts=1 PreemptTime=None", "RUNNING"),
        ("JobId=7 JobState=PENDING Reason=BeginTime Restarts=2 PreemptTime=None", "PENDING"),
        ("JobId=7 JobState=COMPLETING Reason=None Restarts=2 PreemptTime=2026-01-01T10:00:00", "REQUEUED"),
        ("JobId=7 JobState=COMPLETING Reason=None Restarts=1 PreemptTime=2026-01-01T10:00:00", "PREEMPTED"),
        ("JobId=7 JobState=COMPLETING Reason=TimeLimit Restarts=1 PreemptTime=None", "TIMEOUT"),
        ("JobId=7 JobState=COMPLETING Reason=None Restarts=1 PreemptTime=None", "CANCELLED"),
        ("", ""),
    ],
)
def test_what_ends_a_job_is_told_apart(fake, shown, fate):
    fake[1]["scontrol"] = (0, shown)
    assert slurm.fate("7", 1) == fate


@pytest.mark.parametrize(("shown", "reason"), [("7|7|FAILED\n", "is failed"), ("", "does not know")])
def test_waiting_for_a_dead_job_is_refused(fake, shown, reason):
    fake[1]["squeue"] = (0, shown)
    with pytest.raises(ConfigError, match=reason):
        slurm.refuse_dead(["7"])
    fake[1]["squeue"] = (0, "7|7|RUNNING\n")
    slurm.refuse_dead(["7"])


AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_silent_slurm_says_nothing_about_a_job(fake):
    """Not that it is gone: a second launch would be let in, and whoever waits would leave."""
    fake[1]["squeue"] = (1, AWAY)
    with pytest.raises(OSError, match="does not answer"):
        slurm.states(["7"])
    assert [command[0] for command in fake[0]] == ["squeue"]  # one wait for an answer is enough


def test_a_job_that_ends_asks_a_silent_slurm_again(fake, monkeypatch):
    fake[1]["scontrol"] = (1, AWAY)
    pauses = []

    def back(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            fake[1]["scontrol"] = (0, "JobId=7 JobState=RUNNING Restarts=0")

    monkeypatch.setattr(slurm.time, "sleep", back)
    assert slurm.fate("7", 0) == "RUNNING"
    assert len(pauses) == 3
    fake[1]["scontrol"] = (1, AWAY)
    assert slurm.fate("7", 0) == ""  # not for ever


def test_why_a_job_waits_is_slurm_s_word(fake):
    fake[1]["squeue"] = (0, "7|PartitionTimeLimit\n9_1|Resources\n")
    assert slurm.waits(["7", "9_1"]) == {"7": "PartitionTimeLimit", "9_1": "Resources"}
    assert slurm.waits([]) == {}
