"""A start's exit code says whether another start can help."""

import errno
import os
import signal

import pytest
import torch

from halfseen import signals
from halfseen.capsule import NotFinite
from halfseen.checkpoint import Checkpoints
from halfseen.config import ConfigError
from halfseen.data.ledger import TooManyBad
from halfseen.distributed import MEETING, World
from halfseen.launch import records, task
from halfseen.launch.task import Task
from halfseen.lock import Taken
from halfseen.loop import AnotherRank


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a", 1, "is wrong", "use 2"), 2),
        (NotFinite("see the capsule"), 1),
        (TooManyBad("3 of 20"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (FileExistsError(errno.EEXIST, "File exists"), 1),
        (Taken("run.folder", "a", "is being trained by node2, process 7", "wait"), 70),
        (OSError(errno.EIO, "Input/output error"), 70),
        (AnotherRank("that rank says why"), 70),
        (RuntimeError("CUDA error"), 70),
        (SystemExit(75), 75),
        (SystemExit("no"), 1),
    ],
)
def test_exit_codes(error, code, monkeypatch):
    monkeypatch.setattr(task, "AFTER_THE_CAUSE", 0.0)
    assert task.verdict(error)[0] == code


@pytest.fixture
def module(monkeypatch):
    """A stage made of one function; the process is one rank of job 7."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("RANK", "SLURM_PROCID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", MEETING):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in signals.ASKING}

    def make(main, trains=True):
        stage = type("Stage", (), {"main": staticmethod(main), **({"SCHEMA": object} if trains else {})})
        monkeypatch.setattr(task, "module_of", lambda name: stage)

    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_failing_stage_leaves_its_code_and_reason(tmp_path, module, capsys):
    def main(argv):
        raise NotFinite("see the capsule")

    module(main)
    assert task.run(Task("pretrain", str(tmp_path))) == 1
    assert records.why(tmp_path, "7") == (1, "see the capsule")
    assert capsys.readouterr().err == "error: see the capsule\n"


def test_a_complete_stage_leaves_none(tmp_path, module):
    module(lambda argv: 0)
    assert task.run(Task("pretrain", str(tmp_path))) == 0
    assert records.why(tmp_path, "7") == (None, "")
    assert len(records.story(tmp_path).starts) == 1


def test_a_signal_before_the_loop_listens_is_not_lost(tmp_path, module):
    heard = []

    def main(argv):
        os.kill(os.getpid(), signal.SIGUSR2)  # during imports, or while the ranks meet
        with signals.Signals() as asked:
            heard.append(asked.number)
        return signals.SAVED

    module(main)
    assert task.run(Task("pretrain", str(tmp_path))) == signals.SAVED
    assert heard == [signal.SIGUSR2]
    assert records.why(tmp_path, "7")[0] == signals.SAVED


def test_a_stage_that_does_not_train_leaves_at_once(tmp_path, module, monkeypatch):
    left = []
    monkeypatch.setattr(task.os, "_exit", left.append)

    def main(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    module(main, trains=False)
    task.run(Task("evaluate", str(tmp_path)))
    assert left == [signals.SAVED]
    assert records.why(tmp_path, "7")[0] == signals.SAVED


def test_ctrl_c_ends_what_does_not_train(tmp_path, module):
    module(lambda argv: os.kill(os.getpid(), signal.SIGINT) or 0, trains=False)
    assert task.run(Task("evaluate", str(tmp_path))) == task.BROKEN
    assert "KeyboardInterrupt" in records.why(tmp_path, "7")[1]


def test_a_job_that_was_asked_to_stop_does_not_begin(tmp_path, module):
    module(lambda argv: pytest.fail("began"))
    (tmp_path / "launch").mkdir()
    records.ask_to_stop(tmp_path, "7")
    assert task.run(Task("pretrain", str(tmp_path))) == signals.SAVED


def test_other_code_than_the_snapshot_is_refused(tmp_path, module):
    module(lambda argv: pytest.fail("began"))
    assert task.run(Task("pretrain", str(tmp_path), code=str(tmp_path / ".code/ab"))) == 2
    assert "launch.snapshot" in records.why(tmp_path, "7")[1]


def test_a_checkpoint_that_can_never_be_written_is_final(tmp_path):
    """As the error comes out of a save, which tells every rank's."""
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(OSError, match=r"rank 0: .*File exists") as failed:
        Checkpoints(tmp_path / "checkpoints", 2, World()).save(16, {"a": torch.zeros(1)}, {})
    assert str(failed.value).startswith("checkpoint at 16 was not written")
    assert task.verdict(failed.value)[0] == 1


@pytest.mark.parametrize("trains", [True, False])
def test_a_signal_while_torch_is_imported_is_not_lost(trains, tmp_path, module, monkeypatch):
    """submitit, whose handlers are there until then, would drop SIGTERM."""
    began = []
    for number in signals.ASKING:
        signal.signal(number, lambda number, frame: pytest.fail("submitit's handler"))

    def main(argv):
        began.append("began")
        with signals.Signals() as asked:
            return signals.SAVED if asked.number else 0

    module(main, trains)
    monkeypatch.setattr(task, "first_rank", lambda: os.kill(os.getpid(), signal.SIGTERM) or True)
    assert task.run(Task("pretrain", str(tmp_path))) == signals.SAVED
    assert began == (["began"] if trains else [])


def test_a_start_says_that_its_snapshot_is_in_use(tmp_path, module, monkeypatch):
    code = tmp_path / ".code/ab"
    code.mkdir(parents=True)
    os.utime(code, (0, 0))
    monkeypatch.setattr(task, "refuse_other_code", lambda code: None)
    module(lambda argv: 0)
    task.run(Task("pretrain", str(tmp_path / "run"), code=str(code)))
    assert code.stat().st_mtime > 0
