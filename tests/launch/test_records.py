"""The run folder remembers what happened to its jobs."""

import pytest

from halfseen.launch import records


def happen(folder, *events):
    for event, values in events:
        records.add(folder, event, **values)
    return records.story(folder)


def queued(job="7", **more):
    return "queued", {"job": job, "cluster": "slurm", "again": False, **more}


def started(position, attempt="7"):
    return "started", {"attempt": attempt, "position": position}


def ended(verdict, reason="why"):
    return "ended", {"verdict": verdict, "reason": reason, "code": 0}


def test_nothing_was_launched(tmp_path):
    assert records.story(tmp_path).job == ""
    assert not records.story(tmp_path).complete


def test_starts_and_their_reasons_are_counted(tmp_path):
    told = happen(
        tmp_path,
        queued(),
        started(0),
        ended("requeue", "asked"),
        started(16),
        started(32),  # the start before it left no word
        ended("left", "requeued from outside"),
        started(48),
        ended("complete"),
    )
    assert told.complete
    assert [start["position"] for start in told.starts] == [0, 16, 32, 48]
    assert [reason.split(" (")[0] for reason in told.reasons] == [
        "asked",
        "lost without a word",
        "requeued from outside",
    ]


def test_a_new_launch_by_hand_counts_anew_and_a_resubmission_does_not(tmp_path):
    told = happen(tmp_path, queued(), started(0), ended("resubmit"), queued("8", again=True), started(16, "8"))
    assert (told.job, len(told.starts), told.reasons, told.ended) == ("8", 2, ["why"], None)
    told = happen(tmp_path, ended("failed"), queued("9"))
    assert (told.job, told.starts, told.reasons, told.ended) == ("9", [], [], None)


def test_a_job_that_starts_before_its_queueing_is_written_keeps_its_start(tmp_path):
    told = happen(tmp_path, started(0, "7"), queued("7"))
    assert len(told.starts) == 1


def test_a_torn_line_is_left_out(tmp_path):
    happen(tmp_path, queued())
    with (tmp_path / "launch/events.jsonl").open("a") as file:
        file.write('{"event": "sta\n')
    assert happen(tmp_path, started(0)).starts


@pytest.mark.parametrize(
    ("starts", "position", "count"),
    [([], 0, 0), ([0], 0, 1), ([0], 16, 0), ([0, 0, 16, 16], 16, 2), ([0, 16, 16], 32, 0), ([0, 16, 32], 32, 1)],
)
def test_fruitless_starts_are_those_without_a_newer_checkpoint(starts, position, count):
    assert records.fruitless([{"position": start} for start in starts], position) == count


def test_the_first_rank_to_end_says_why(tmp_path):
    records.say_why(tmp_path, "7.1", 1, "disk full")
    records.say_why(tmp_path, "7.1", 70, "connection lost")
    assert records.why(tmp_path, "7.1") == (1, "disk full")
    assert records.why(tmp_path, "7") == (None, "")


def test_only_published_checkpoints_count(tmp_path):
    for name in ("img_000000000160", "img_000000000320", ".partial_img_000000000480"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert records.newest(tmp_path) == 0
    (tmp_path / "checkpoints/img_000000000160/manifest.json").write_text("{}")
    (tmp_path / "checkpoints/.partial_img_000000000480/manifest.json").write_text("{}")
    assert records.newest(tmp_path) == 160


@pytest.mark.parametrize(
    ("variables", "attempt"),
    [
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, "7.2"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
        ({"SUBMITIT_LOCAL_JOB_ID": "55"}, "55"),
    ],
)
def test_an_attempt_is_a_job_and_its_restart(variables, attempt, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SUBMITIT_LOCAL_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert records.attempt() == attempt
    assert records.job_of(attempt) == attempt.partition(".")[0]
