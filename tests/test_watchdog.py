"""A run that stands still tells who is late, leaves stacks, and ends with its own exit code."""

import json
import os
import threading
import time
from types import SimpleNamespace

import pytest
import ranks
import torch
from toys import TOTAL, stream
from trainee import LONGEST, train

from halfseen import watchdog
from halfseen.distributed import World, started
from halfseen.loop import AnotherRank
from halfseen.watchdog import STALLED, Watchdog, verdict

SECONDS = 2.0
STATED = 30.0  # seconds within which every rank ends after the first has noticed


def one_of_two(folder, rank, port):
    """Rank 1 never gets the data of its third step."""
    os.environ.update(ranks.environment(rank, 2, port))
    watchdog.LOOK = 0.25

    def data(plan, rank, start):
        for count, batch in enumerate(stream(plan, rank, start)):
            if rank == 1 and count == 5:
                threading.Event().wait()
            yield batch

    told = os.open(folder / f"told_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(told, 2)
    with started("cpu") as world:
        train(folder, world, LONGEST, data=data, minutes=SECONDS / 60, reading=words)
    return 0


def words(rank, position, number):
    return f"what {rank} needs for {position}.{number}"


def test_a_stall_names_the_late_rank_and_ends_every_rank(tmp_path):
    port = ranks.free_port()
    processes = [ranks.begin(one_of_two, tmp_path, rank, port) for rank in range(2)]
    for process in processes:
        process.join(SECONDS + STATED)
        assert process.exitcode == STALLED
    first = (tmp_path / "told_0").read_text()
    assert "rank 0 stands still" in first
    assert "stalled: late is rank 1 " in first
    assert f"in phase 'data' at {2 * TOTAL}, reading what 1 needs for {2 * TOTAL}.1;" in first
    stacks = [(tmp_path / f"stall_rank_{rank}.txt").read_text() for rank in range(2)]
    assert "phase agree" in stacks[0]
    assert "largest" in stacks[0]  # where rank 0 waits for rank 1
    assert "phase data" in stacks[1]
    assert "in wait" in stacks[1]


def test_a_run_that_lives_is_left_alone(tmp_path, monkeypatch):
    barked = []
    monkeypatch.setattr(Watchdog, "_bark", lambda self, silent: barked.append(silent))  # not this process's end
    with Watchdog(tmp_path, 1.5 / 60, World()) as watchdog:
        for step in range(20):
            watchdog.beat("step", step)
            time.sleep(0.1)
    beat = json.loads((tmp_path / "heartbeat" / "rank_0.json").read_text())
    assert beat["phase"] == "step"
    assert beat["beats"] > 1
    assert barked == []
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_zero_minutes_watch_nothing(tmp_path):
    with Watchdog(tmp_path, 0, World()) as watchdog:
        watchdog.beat("step", 0)
        assert watchdog.thread is None
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_told_and_survived(tmp_path, capsys):
    (tmp_path / "heartbeat").write_text("in the way")
    with Watchdog(tmp_path, 1, World()):
        pass
    assert "was not written" in capsys.readouterr().err


def heartbeats(folder, *beats):
    for rank, count in enumerate(beats):
        content = {"rank": rank, "host": "h", "pid": 1, "phase": "step", "position": 7, "turn": 0, "beats": count}
        if count is not None:
            (folder / f"rank_{rank}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("beats", "said"),
    [
        ((9, 9, 8), "late is rank 2 "),
        ((9, 8, 8), "late is rank 1 (h, process 1) in phase 'step' at 7; rank 2 "),
        ((9, 9, 9), "all ranks are equally far"),
        ((9, None, 9), "no heartbeat at all from ranks [1]"),
    ],
)
def test_the_late_ranks_are_those_with_the_fewest_beats(tmp_path, beats, said):
    heartbeats(tmp_path, *beats)
    assert said in verdict(tmp_path, 3)


# ------------------------------------------------------------------------------------------ one rank fails


def failing(folder, rank, port, deaf):
    """Rank 1 fails inside its third step; rank 0 waits for it, or, deaf, for something that never comes."""
    os.environ.update(ranks.environment(rank, 2, port))
    os.environ["OMP_NUM_THREADS"] = "1"
    watchdog.LOOK, watchdog.ALONE = 0.25, 0.5
    os.dup2(os.open(folder / f"told_{rank}", os.O_CREAT | os.O_WRONLY), 2)

    def broken(engine):
        forward = engine.forward

        def raises(batch):
            if engine.world.rank == 1 and int(batch["position"][0]) >= 2 * TOTAL:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
            if engine.world.rank == 0 and deaf and int(batch["position"][0]) >= 2 * TOTAL:
                threading.Event().wait()
            return forward(batch)

        engine.forward = raises
        return engine

    with started("cpu") as world:
        train(folder, world, LONGEST, minutes=10, change=broken)
    return 0


@pytest.mark.parametrize("deaf", [False, True])
def test_a_failure_inside_the_step_of_one_rank_ends_all_and_is_named(tmp_path, deaf):
    """Not after the watchdog's ten minutes: at once, or, where a rank hears nothing, in the time that ALONE allows."""
    port = ranks.free_port()
    processes = [ranks.begin(failing, tmp_path, rank, port, deaf) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 1
    cause = f"in phase 'step' at {2 * TOTAL}: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
    first = (tmp_path / "failed.txt").read_text()
    assert first.startswith("rank 1 (")
    assert first.endswith(cause)
    for rank in range(2):
        assert f"first to fail was {first}" in (tmp_path / f"told_{rank}").read_text()
    assert not list(tmp_path.glob("stall_rank_*"))


def test_the_first_failure_is_kept_and_a_new_start_forgets_it(tmp_path, capsys):
    def fails(rank, error):
        watchdog = Watchdog(tmp_path, 0, World(rank, 2))
        watchdog.beat("step", 24)
        with pytest.raises(type(error)), watchdog:
            raise error

    fails(1, AnotherRank("rank 0 could not read"))  # no cause of its own
    assert not (tmp_path / "failed.txt").exists()
    fails(1, ValueError("the first"))
    text = (tmp_path / "failed.txt").read_text()
    assert "rank 1 (" in text
    fails(1, RuntimeError("what follows"))
    assert (tmp_path / "failed.txt").read_text() == text
    with Watchdog(tmp_path, 0, World(0, 2)):
        assert not (tmp_path / "failed.txt").exists()
    assert "the first" in capsys.readouterr().err


def test_a_rank_ends_even_where_it_cannot_read_why(tmp_path, monkeypatch, capsys):
    """The folder that told it may be gone with the node that failed."""

    def ended(code):
        raise SystemExit(code)

    monkeypatch.setattr(watchdog.os, "_exit", ended)
    with pytest.raises(SystemExit) as left:
        Watchdog(tmp_path / "gone", 0, World(rank=1, world=2))._leave()
    assert left.value.code == 1
    assert "rank 1 ends: first to fail was told in" in capsys.readouterr().err


def test_a_process_that_was_stopped_as_a_whole_begins_anew(tmp_path, monkeypatch):
    """A laptop's lid, a debugger: no thread of it ran, so its silence says nothing."""
    ahead, barks, looks = [0.0], [], threading.Semaphore(0)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog, "LOOK", 0.01)
    monkeypatch.setattr(Watchdog, "_write", lambda dog: looks.release())
    monkeypatch.setattr(Watchdog, "_bark", lambda dog, silent: barks.append(silent))
    with Watchdog(tmp_path, 10.0, World()):
        for jump in (0.0, 700.0, 0.0):
            ahead[0] += jump
            for _ in range(3):
                assert looks.acquire(timeout=60)
    assert barks == []


def test_rank_0_joins_the_first_that_notices(tmp_path, monkeypatch):
    """Else that rank's leaving would break rank 0's message, and nobody would name the late one."""
    barked = threading.Event()
    monkeypatch.setattr(watchdog, "LOOK", 0.01)
    monkeypatch.setattr(Watchdog, "_bark", lambda dog, silent: barked.set())
    with Watchdog(tmp_path, 10.0, World(world=2)):
        (tmp_path / "stall_rank_1.txt").touch()
        assert barked.wait(60)
