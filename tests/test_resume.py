"""A killed run is the same run: real processes, real shards, kill -9, another world, another folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECORDER = Path(__file__).with_name("recorder.py")
IMAGES, BATCH = 320, 16
RECIPE = [
    "pretrain/demo",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.drop_path=0.2",
    "objective.mae.decoder_width=32",
    "objective.mae.decoder_depth=1",
    "data.image_size=32",
    f"run.images={IMAGES}",
    f"run.global_batch={BATCH}",
    "run.checkpoint_every=48",
    "run.log_every=1 steps",
    "run.picture_every=0",
    "engine.ema=0.9",
]

PATIENCE = 300  # seconds for what takes ten on a machine with nothing else to do


def launch(*arguments, ranks=1, keys=None):
    """Start a pretraining run; keys: a file that gets what enters each step."""
    program = ["-m", "halfseen.pretrain"] if keys is None else [str(RECORDER), str(keys)]
    if ranks > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(*arguments, ranks=1, keys=None):
    process = launch(*arguments, ranks=ranks, keys=keys)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["position"]: row["loss"] for row in rows if "loss" in row}


def sequence(keys):
    """What every position of a run held, from the files of all its processes; a repeated step holds the same again."""
    found = {}
    for path in keys.parent.glob(f"{keys.name}.*"):
        for line in path.read_text().splitlines():
            position, key = line.split("\t")
            assert found.setdefault(int(position), key) == key, position
    return found


def rows(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    keys = folder.with_name("keys")
    finish(*RECIPE, f"run.folder={folder}", keys=keys)
    found = losses(folder)
    assert sorted(found) == list(range(BATCH, IMAGES + 1, BATCH))
    order = sequence(keys)
    assert sorted(order) == list(range(IMAGES))
    assert len(set(order.values())) == IMAGES  # less than an epoch: no image twice
    return folder, found, order


def kill_after(folder, count, *arguments, keys=None):
    """kill -9 the run and its loader processes once it has logged so many steps and published a checkpoint."""
    process = launch(*arguments, keys=keys)
    deadline = time.monotonic() + PATIENCE

    def far():
        return rows(folder) >= count and list((folder / "checkpoints").glob("img_*"))

    while not far() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    arrived = far()
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert arrived, f"it took {PATIENCE} s and was not there:\n{output}"


@pytest.mark.parametrize(("count", "workers"), [(5, 2), (8, 0)])
def test_kill_9_and_resume_gives_the_same_losses_to_the_bit(tmp_path, reference, count, workers):
    folder = tmp_path / "run"
    keys = tmp_path / "keys"
    kill_after(folder, count, *RECIPE, f"run.folder={folder}", f"data.workers={workers}", keys=keys)
    # It continues from the run folder alone, moved elsewhere, with another number of loader processes.
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    output = finish(str(moved), f"data.workers={2 - workers}", keys=keys)
    assert "resumed" in output
    assert losses(moved) == reference[1]
    assert sequence(keys) == reference[2]


def test_a_run_continues_on_two_ranks_under_another_engine(tmp_path, reference):
    folder = tmp_path / "run"
    # Drop-path depends on the rank, so here it is off; everything else must not notice the ranks.
    recipe = [*RECIPE, "model.drop_path=0"]
    finish(*recipe, f"run.folder={tmp_path / 'whole'}")
    expected = losses(tmp_path / "whole")
    keys = tmp_path / "keys"
    kill_after(folder, 5, *recipe, f"run.folder={folder}", keys=keys)
    output = finish(str(folder), "engine.name=fsdp", ranks=2, keys=keys)
    assert "2 ranks" in output
    assert sequence(keys) == reference[2]
    found = losses(folder)
    assert sorted(found) == sorted(expected)
    for position, loss in expected.items():
        assert found[position] == pytest.approx(loss, rel=2e-6), position


def test_another_config_in_the_same_folder_is_refused(reference):
    process = launch(*RECIPE, f"run.folder={reference[0]}", "optim.lr=1e-3")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "optim.lr" in output
    assert "run.init=" in output


def test_a_complete_run_says_so_and_changes_nothing(reference):
    before = losses(reference[0])
    assert "complete" in finish(str(reference[0]))
    assert losses(reference[0]) == before


def test_two_runs_on_one_node_do_not_meet(tmp_path, reference):
    """Each with two ranks and loader processes: ports, shared memory and folders are their own."""
    recipe = [*RECIPE, "model.drop_path=0", "data.workers=1"]
    folders = [tmp_path / name for name in ("one", "other")]
    processes = [launch(*recipe, f"run.folder={f}", f"run.seed={n}", ranks=2) for n, f in enumerate(folders)]
    for process in processes:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    one, other = (losses(folder) for folder in folders)
    assert sorted(one) == sorted(other) == sorted(reference[1])
    assert one != other
    for process in processes:  # each led a session of its own: nothing of it is left
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
