"""Status, logs, stop and the sweep's table read run folders as they are, also half-written ones."""

import csv
import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest

from halfseen.config import ConfigError
from halfseen.launch import board, command, logs, records, slurm, status, stop, sweep
from halfseen.launch.task import Task


@pytest.fixture
def run(tmp_path):
    """A run in the middle of its second start."""
    folder = tmp_path / "runs/a"
    Task("pretrain", str(folder), "stage: pretrain\n", total=1000).save()
    records.add(folder, "queued", job="7", cluster="slurm")
    records.add(folder, "started", attempt="7", position=0)
    records.add(folder, "ended", attempt="7", verdict="requeue", reason="asked to leave", code=75, position=160)
    records.add(folder, "started", attempt="7.1", position=160)
    rows = [{"position": 160, "loss": 2.0, "images_per_second": 10.0}, {"position": 320, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"posi')
    checkpoint = folder / "checkpoints/img_000000000160"
    checkpoint.mkdir(parents=True)
    (checkpoint / "a.distcp").write_bytes(b"12345")
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"a.distcp": {"bytes": 5}}}))
    return folder


def test_a_running_run_at_a_glance(run):
    seen = status.look(run, known={"7": "RUNNING"})
    assert (seen.state, seen.position, seen.total, seen.speed, seen.restarts) == ("running", 320, 1000, 10.0, 1)
    assert seen.left == 68.0
    assert seen.checkpoint.startswith("160, ")
    assert seen.checkpoint.endswith("whole")
    assert seen.reason == "asked to leave"
    table = "\n".join(status.lines([seen]))
    assert "320 of 1,000 (32%)" in table
    assert "1 min" in table


@pytest.mark.parametrize(
    ("state", "word"), [("PENDING", "pending"), ("CANCELLED", "cancelled"), ("FAILED", "gone"), ("", "gone")]
)
def test_slurm_says_what_the_folder_does_not_know(run, state, word):
    assert status.look(run, known={"7": state} if state else {}).state == word


def test_why_a_job_waits_is_shown(run):
    seen = status.look(run, known={"7": "PENDING"}, waits={"7": "PartitionTimeLimit"})
    assert seen.reason == "waits: PartitionTimeLimit; asked to leave"


@pytest.mark.parametrize("present", [True, False])
def test_without_an_answer_the_folders_speak(run, present, monkeypatch, capsys):
    """No Slurm here, or a silent one."""
    away = subprocess.CompletedProcess([], 1, "", "squeue: error: Socket timed out on send/recv operation")
    monkeypatch.setattr(slurm, "ask", lambda *command: away)
    monkeypatch.setattr(slurm, "present", lambda: present)
    assert status.main([str(run)]) == 0
    said = capsys.readouterr()
    assert "this is what the folders say" in said.err
    assert " running " in said.out


def test_ended_runs_are_not_asked_about(run, monkeypatch):
    records.add(run, "ended", attempt="7.1", verdict="complete", reason="", code=0)
    monkeypatch.setattr(slurm, "ask", lambda *command: pytest.fail("asked"))
    assert status.main([str(run)]) == 0


def test_a_teacher_s_answers_are_progress(tmp_path):
    """Whole shards: the last one reaches beyond what was asked for."""
    store = tmp_path / "answers"
    Task("teach", str(store), "stage: distill\n", total=1000).save()
    records.add(store, "queued", job="7", cluster="slurm")
    records.add(store, "started", attempt="7", position=0)
    began = records.story(store).starts[0]["time"]
    assert status.look(store, known={"7": "RUNNING"}).position == 0
    (store / "store.json").write_text(json.dumps({"store.shard_images": 256}))
    for number in range(2):
        shard = store / f"positions-{number:012d}.tar"
        shard.touch()
        os.utime(shard, (began + 8 * (number + 1),) * 2)
    seen = status.look(store, known={"7": "RUNNING"})
    assert (seen.position, seen.total, seen.speed, seen.left) == (512, 1000, 32.0, 15.25)
    assert "512 of 1,000 (51%)" in "\n".join(status.lines([seen]))
    assert "2 shards" in "\n".join(status.lines([seen]))
    for number in (2, 3):
        (store / f"positions-{number:012d}.tar").touch()
    assert status.look(store, known={}).position == 1000


def test_folders_of_others_are_passed_over(run, monkeypatch):
    closed = run.parent / "closed"
    closed.mkdir()
    monkeypatch.setattr(status.os, "access", lambda path, mode: path != closed)
    monkeypatch.setattr(status.Path, "iterdir", lambda path: pytest.fail("looked") if path == closed else [closed])
    assert list(status.find(run.parent)) == []


def test_a_damaged_checkpoint_is_named(run):
    (run / "checkpoints/img_000000000160/a.distcp").write_bytes(b"123")
    assert "DAMAGED: a.distcp" in status.look(run, known={}).checkpoint


def test_runs_are_found_below_a_folder_and_not_inside_a_run(run, tmp_path):
    (tmp_path / "runs/a/checkpoints/img_000000000160/launch").mkdir()
    (tmp_path / "runs/b/c").mkdir(parents=True)
    (tmp_path / "runs/b/c/metrics.jsonl").write_text("")
    assert list(status.find(tmp_path)) == [run, tmp_path / "runs/b/c"]


def test_status_stop_and_logs_do_not_import_torch():
    """They must answer at once, on login nodes without a GPU driver too."""
    words = (
        "import halfseen.launch.status, halfseen.launch.stop, halfseen.launch.after, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("ask", [status.main, stop.main, board.main])
def test_a_folder_that_is_not_there_is_refused(ask, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        ask([str(tmp_path / "none")])


def test_logs_print_one_rank_of_the_newest_job(run, capsys):
    for job, rank in (("6", 0), ("7", 0), ("7", 1)):
        path = run / "launch" / job / f"{job}_{rank}_log.out"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"first\njob {job} rank {rank}\n")
    logs.main([str(run), "-n", "1"])
    assert capsys.readouterr().out == "job 7 rank 0\n"
    logs.main([str(run), "--rank", "1"])
    assert capsys.readouterr().out == "first\njob 7 rank 1\n"
    with pytest.raises(ConfigError, match="no log yet"):
        logs.main([str(run), "--rank", "2"])


def test_logs_follow_a_run_from_one_job_to_the_next(run, monkeypatch, capsys):
    """What is there, what is added, then the log of the job that a resubmission made, until that has ended."""

    def write(job, text):
        path = run / "launch" / job / f"{job}_0_log.out"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    events = [
        lambda: write("7", "three\n"),
        lambda: (records.add(run, "queued", job="8", cluster="slurm", again=True), write("8", "four\n")),
        lambda: (write("8", "five\n"), monkeypatch.setattr(slurm, "states", lambda jobs: {})),
    ]
    write("7", "one\ntwo\n")
    monkeypatch.setattr(slurm, "states", lambda jobs: dict.fromkeys(jobs, "RUNNING"))
    monkeypatch.setattr(logs.time, "sleep", lambda pause: events.pop(0)())
    logs.main([str(run), "-f", "-n", "1"])
    assert capsys.readouterr().out == "two\nthree\nfour\nfive\n"
    assert not events


@pytest.mark.parametrize(
    ("state", "arguments", "asked"),
    [("RUNNING", [], ("7", "USR2")), ("PENDING", [], ("7",)), ("RUNNING", ["--now"], ("7",))],
)
def test_stop_asks_a_running_job_to_save_and_cancels_a_waiting_one(run, monkeypatch, capsys, state, arguments, asked):
    said = []
    monkeypatch.setattr(slurm, "cancel", lambda *words: said.append(words))
    monkeypatch.setattr(slurm, "states", lambda jobs: {"7": state})
    assert stop.main([str(run), *arguments]) == 0
    assert said == [asked]
    assert records.asked_to_stop(run, "7")
    assert not records.asked_to_stop(run, "8")
    monkeypatch.setattr(slurm, "states", lambda jobs: {})
    capsys.readouterr()
    stop.main([str(run)])
    assert "nothing is queued" in capsys.readouterr().out


@pytest.mark.parametrize("verdict", [None, "left", "requeue"])
def test_whoever_waits_for_a_job_that_somebody_cancelled_goes_on(run, verdict, monkeypatch, capsys):
    """While it ran, or while it waited for its next start."""
    if verdict:
        records.add(run, "ended", attempt="7.1", verdict=verdict, reason="CANCELLED", code=75)
    monkeypatch.setattr(slurm, "states", lambda jobs: {"7": "CANCELLED"})
    assert command.wait(run) == 1
    assert "is gone" in capsys.readouterr().err


def test_whoever_waits_outlasts_a_silent_slurm(run, monkeypatch):
    answers = [OSError("Slurm does not answer"), {"7": "RUNNING"}, {"7": "COMPLETING"}]

    def states(jobs):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        if not answers:
            records.add(run, "ended", attempt="7.1", verdict="complete", reason="", code=0)
        return answer

    monkeypatch.setattr(slurm, "states", states)
    assert command.wait(run, pause=0) == 0
    assert not answers


def test_a_stop_that_slurm_refuses_is_no_stop_later(run, monkeypatch):
    """Another user's job: it must not end at its next restart either."""

    def refuse(*words):
        raise OSError("job 7 was not cancelled: Access/permission denied")

    monkeypatch.setattr(slurm, "cancel", refuse)
    monkeypatch.setattr(slurm, "states", lambda jobs: {"7": "RUNNING"})
    with pytest.raises(OSError, match="denied"):
        stop.main([str(run)])
    assert not records.asked_to_stop(run, "7")


def test_stop_of_a_sweep_stops_the_members_that_have_a_job(run, tmp_path, monkeypatch, capsys):
    for number, job in (("000", "9_0"), ("001", "9_1"), ("002", "9_2")):
        Task("pretrain", str(tmp_path / "sweep" / number), "stage: pretrain\n").save()
        records.add(tmp_path / "sweep" / number, "queued", job=job, cluster="slurm")
    said = []
    monkeypatch.setattr(slurm, "cancel", lambda *words: said.append(words))
    known = {"9_0": "COMPLETED", "9_1": "RUNNING", "9_2": "PENDING"}
    monkeypatch.setattr(slurm, "states", lambda jobs: {job: known[job] for job in jobs})
    assert stop.main([str(tmp_path / "sweep")]) == 0
    assert said == [("9_1", "USR2"), ("9_2",)]
    assert "002: job 9_2 ended" in capsys.readouterr().out


def test_a_sweep_s_table_has_every_member_whatever_became_of_it(run, tmp_path):
    base = tmp_path / "sweep"
    run.rename(base.mkdir() or base / "000")
    records.add(base / "000", "ended", verdict="complete", reason="complete", code=0)
    records.add(base / "001", "queued", job="8", cluster="slurm")
    records.add(base / "001", "ended", verdict="failed", reason="loss, not finite", code=1)
    members = [{"folder": f"{n:03d}", "set": [f"optim.lr={n}"]} for n in range(3)]
    (base / "launch").mkdir()
    (base / "launch/sweep.json").write_text(json.dumps({"members": members}))
    sweep.write_table(base)
    with (base / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["member"], row["optim.lr"], row["state"], row["loss"], row["reason"]) for row in rows] == [
        ("000", "0", "complete", "1.0", ""),
        ("001", "1", "failed", "", "loss, not finite"),
        ("002", "2", "not launched", "", ""),
    ]


@pytest.mark.parametrize(
    ("content", "members"),
    [
        ("grid: {a: [1, 2], b: [x]}", [["a=1", "b=x"], ["a=2", "b=x"]]),
        ("list: [{a: 1e-3}, {b: [1, 2], c: null}]", [["a=1e-3"], ["b=[1, 2]", "c=null"]]),
    ],
)
def test_a_sweep_crosses_a_grid_or_takes_a_list(tmp_path, content, members):
    (tmp_path / "s.yaml").write_text(content)
    assert sweep.combinations(tmp_path / "s.yaml") == members


@pytest.mark.parametrize(
    "content", ["", "grid: {a: 1}", "list: []", "grid: {a: [1]}\nlist: [{a: 1}]", "[1", "rows: [1]"]
)
def test_a_sweep_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError, match="sweep"):
        sweep.combinations(tmp_path / "s.yaml")


def test_a_board_starts_and_leaves_nothing_behind(run):
    """TensorBoard answers with the runs' names; when the board is ended, so are its server and its folder of links."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("train/loss", 1.0, 10)
    command = [sys.executable, "-m", "halfseen", "board", str(run), "--port", "0", "--load_fast", "false"]
    environment = os.environ | {"TMPDIR": str(run.parent)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as board:
        address = next(found[0] for line in board.stderr if (found := re.findall(r"http://localhost:\d+/", line)))
        names = []
        while not names:  # it answers before it has read them
            with urllib.request.urlopen(f"{address}data/runs", timeout=60) as answer:
                names = json.load(answer)
        assert names == ["a"]
        board.terminate()
        assert board.wait(timeout=60) == 0
    assert not list(run.parent.glob("*-halfseen-board"))
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}data/runs", timeout=60)


def test_a_board_shows_each_run_under_its_own_name(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from torch.utils.tensorboard import SummaryWriter

    for folder in (run, tmp_path / "runs/deep/b"):
        for start, end in ((0, 40), (20, 60)):  # a resume repeats steps 20 to 40
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}")
            for step in range(start + 10, end + 1, 10):
                writer.add_scalar("train/loss", start + step, step)
            writer.close()
        (folder / "metrics.jsonl").touch()
    names = board.runs_of([tmp_path / "runs"])
    assert sorted(names) == ["a", "deep/b"]
    (tmp_path / "board").mkdir()
    board.link(names, tmp_path / "board")
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "board")).Reload()
    assert sorted(shown.Runs()) == ["a", "deep-b"]
    for name in shown.Runs():
        assert [event.step for event in shown.Scalars(name, "train/loss")] == [10, 20, 30, 40, 50, 60]
        assert [event.value for event in shown.Scalars(name, "train/loss")] == [10, 20, 50, 60, 70, 80]
    with pytest.raises(ConfigError, match="no run with a tensorboard folder"):
        board.main([str(tmp_path / "runs/a/launch")])
