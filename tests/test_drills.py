"""Drills: a run that is killed, told to stop, or out of disk goes on as if nothing had happened."""

import errno
import json
import os
import signal
import time

import pytest
import ranks
from toys import TOTAL
from trainee import LONGEST, train

from halfseen.checkpoint import folder as layout
from halfseen.distributed import World, started
from halfseen.signals import SAVED


def losses(folder):
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return dict(rows)  # a step that was run twice: the last one counts


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ one process


def run_to_the_end(folder, slow, beside=True):
    """A process of one rank: the exit code is the one the stages document."""
    folder.mkdir(exist_ok=True)
    outcome, _, log = train(folder, World(), LONGEST, slow=slow, beside=beside, ema=0.9, student={"dropout": 0.3})
    (folder / "notes").write_text("\n".join(log.notes))
    return SAVED if outcome.stopped_by else 0


def wait_for_steps(folder, process, count):
    for _ in range(3000):
        if (folder / "losses.jsonl").exists() and len((folder / "losses.jsonl").read_text().splitlines()) >= count:
            return
        assert process.is_alive()
        time.sleep(0.02)
    raise AssertionError("the run makes no steps")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_to_the_end(folder, 0) == 0
    return losses(folder)


def test_sigterm_saves_and_exits_75_and_the_rest_has_the_same_bits(tmp_path, whole):
    run = tmp_path / "run"
    process = ranks.begin(run_to_the_end, run, 0.1)
    wait_for_steps(run, process, 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == SAVED == os.EX_TEMPFAIL
    assert "SIGTERM: saved at" in (run / "notes").read_text()
    reached = max(losses(run))
    assert reached < LONGEST
    assert names(run)[-1] == f"img_{reached:012d}"
    assert run_to_the_end(run, 0) == 0
    assert losses(run) == whole
    assert len((run / "losses.jsonl").read_text().splitlines()) == len(whole)  # no step was taken twice


def test_kill_nine_loses_only_what_came_after_the_last_checkpoint(tmp_path, whole):
    run = tmp_path / "run"
    for kills in (5, 11):
        process = ranks.begin(run_to_the_end, run, 0.1)
        wait_for_steps(run, process, kills)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert run_to_the_end(run, 0) == 0
    assert losses(run) == whole
    assert len((run / "losses.jsonl").read_text().splitlines()) > len(whole)


def killed_before_the_manifest(folder, beside):
    """Dies between the last byte of the tensors and the manifest."""
    layout.write_manifest = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    return run_to_the_end(folder, 0, beside)


def killed_amid_the_tensors(folder, beside):
    """Dies when the tensors' file is written but not yet on disk, nor listed anywhere."""
    import torch.distributed.checkpoint.filesystem as written_by

    written_by.os.fsync = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    return run_to_the_end(folder, 0, beside)


def killed_before_the_rename(folder, beside):
    """Dies with everything in place under the name that does not count."""
    layout.sync = lambda path: path.name.startswith(".partial") and os.kill(os.getpid(), signal.SIGKILL)
    return run_to_the_end(folder, 0, beside)


@pytest.mark.parametrize(
    ("killed", "beside"),
    [
        (killed_amid_the_tensors, True),
        (killed_before_the_manifest, True),
        (killed_before_the_manifest, False),
        (killed_before_the_rename, True),
    ],
)
def test_kill_nine_while_saving_leaves_no_checkpoint_that_counts(tmp_path, whole, killed, beside):
    run = tmp_path / "run"
    process = ranks.begin(killed, run, beside)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert names(run) == [f".partial_img_{3 * TOTAL:012d}"]
    assert run_to_the_end(run, 0) == 0
    assert losses(run) == whole
    assert not [name for name in names(run) if name.startswith(".partial")]


def full_disk(folder):
    """From the second checkpoint on there is no space left."""
    import torch.distributed.checkpoint.filesystem as written_by

    def fsync(*arguments):
        if (folder / "checkpoints" / f"img_{3 * TOTAL:012d}").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    written_by.os.fsync = fsync
    with pytest.raises(OSError, match="No space left on device"):
        run_to_the_end(folder, 0)
    return 3


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path, whole):
    run = tmp_path / "run"
    process = ranks.begin(full_disk, run)
    process.join(60)
    assert process.exitcode == 3
    assert names(run) == [f"img_{3 * TOTAL:012d}"]  # and the unfinished one takes no space
    assert run_to_the_end(run, 0) == 0
    assert losses(run) == whole


def killed_while_removing(folder):
    """Dies when the oldest checkpoint has lost its name, and not yet its files."""
    from halfseen.checkpoint import checkpoints

    remove = checkpoints.shutil.rmtree

    def killed(path, **options):
        if "removed" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        remove(path, **options)

    checkpoints.shutil.rmtree = killed
    return run_to_the_end(folder, 0)


def test_kill_nine_while_removing_the_oldest_leaves_the_kept_ones(tmp_path, whole):
    run = tmp_path / "run"
    process = ranks.begin(killed_while_removing, run)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = [f"img_{position * TOTAL:012d}" for position in (6, 9)]
    assert names(run) == [f".partial_removed_img_{3 * TOTAL:012d}", *kept]
    assert run_to_the_end(run, 0) == 0
    assert losses(run) == whole
    assert not [name for name in names(run) if name.startswith(".partial")]


def test_a_run_goes_on_from_the_newest_healthy_checkpoint_and_names_the_bad_file(tmp_path, whole, capsys):
    run = tmp_path / "run"
    run.mkdir()
    train(run, World(), 6 * TOTAL, ema=0.9, student={"dropout": 0.3})
    newest = run / "checkpoints" / f"img_{6 * TOTAL:012d}"
    bad = newest / "__0_0.distcp"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    assert run_to_the_end(run, 0) == 0
    assert losses(run) == whole
    told = capsys.readouterr().err
    assert f"checkpoint {newest.name} passed over" in told
    assert "__0_0.distcp: its content has changed" in told


# ------------------------------------------------------------------------------------------ one rank of several


def on_rank(folder, rank, port, engine, dying):
    """One of two ranks of a run; rank 1 may be killed as ``dying`` says."""
    os.environ.update(ranks.environment(rank, 2, port))
    die = {"step": in_the_backward, "save": in_the_save}[dying] if dying and rank == 1 else lambda made: made
    with started("cpu") as world:
        train(folder, world, LONGEST, engine=engine, change=die, beside=dying == "save", ema=0.9)
    return 0


def in_the_backward(engine):
    """Killed between forward and backward of the sixth step: the others wait for its gradients."""
    backward, seen = engine.backward, []

    def killed(loss):
        seen.append(loss)
        if len(seen) == 2 * 5 + 1:  # of two micro-batches each
            os.kill(os.getpid(), signal.SIGKILL)
        backward(loss)

    engine.backward = killed
    return engine


def in_the_save(engine):
    """Killed in the second checkpoint, its tensors written: the others wait for the names of its files."""
    fingerprint, seen = layout.fingerprint, []

    def killed(path):
        seen.append(path)
        if f"img_{6 * TOTAL:012d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return fingerprint(path)

    layout.fingerprint = killed
    return engine


def on_both_ranks(folder, engine, dying=""):
    """Exit codes of the two."""
    folder.mkdir(exist_ok=True)
    port = ranks.free_port()
    pair = [ranks.begin(on_rank, folder, rank, port, engine, dying) for rank in range(2)]
    for process in pair:
        process.join(60)
    return [process.exitcode for process in pair]


@pytest.mark.parametrize(("engine", "dyings"), [("ddp", ["step", "save"]), ("fsdp", ["step"])])
def test_kill_nine_of_one_rank_ends_the_other_and_costs_no_more_than_the_last_interval(tmp_path, engine, dyings):
    assert on_both_ranks(tmp_path / "whole", engine) == [0, 0]
    for dying in dyings:
        run = tmp_path / dying
        first, second = on_both_ranks(run, engine, dying)
        assert second == -signal.SIGKILL
        assert first not in (0, None)
        assert [name for name in names(run) if name.startswith("img")] == [f"img_{3 * TOTAL:012d}"]
        assert on_both_ranks(run, engine) == [0, 0]
        assert losses(run) == losses(tmp_path / "whole")
