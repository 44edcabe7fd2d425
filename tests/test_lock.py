"""A run folder is trained by one start at a time, and is free again however that one ends."""

import errno
import fcntl
import os
import signal
import time

import pytest
import ranks

from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.lock import held


def holds(folder):
    """Hold the folder until killed, with a child that lives on."""
    with held(folder, World()):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(60)
    return 0


def test_a_second_start_is_refused_by_name_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    first = ranks.begin(holds, folder)
    deadline = time.monotonic() + 300
    while not (folder / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with (
        pytest.raises(ConfigError, match=rf"run\.folder.*is being trained by .*, process {first.pid}\b"),
        held(folder, World()),
    ):
        raise AssertionError("entered")
    os.kill(first.pid, signal.SIGKILL)
    first.join(60)
    with held(folder, World()):  # though a loader process of the first is still there
        pass


def refused(world, folder):
    """Of two ranks rank 0 alone meets the lock; both hear of it."""
    if world.main:

        def taken(*arguments):
            raise OSError(errno.EAGAIN, "taken")

        fcntl.lockf = taken
    with pytest.raises(ConfigError, match="another process"), held(folder, world):
        raise AssertionError("entered")
    return True


def test_every_rank_is_refused(tmp_path):
    assert ranks.run(refused, 2, tmp_path) == [True, True]


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def none(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with held(tmp_path, World()):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
