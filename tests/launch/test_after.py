"""What follows an end: complete, again in the same job, again in a new one, or a reason and no more."""

import pytest

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
    assert verdict(137, fruitless=3).word == "requeue"
    found = verdict(137, fruitless=4)
    assert found.word == "failed"
    assert "4 starts in a row brought no newer checkpoint" in found.reason
    assert "SIGKILL" in found.reason


def test_a_stop_is_final_unless_the_run_was_complete():
    assert verdict(75, stop=True).word == "stopped"
    assert verdict(0, stop=True).word == "complete"
