"""A checkpoint is whole or it is not there; bad ones are passed over by name; the last good one stays."""

import errno
import json
import shutil
import subprocess
import threading
from collections import namedtuple

import pytest
import ranks
import torch
from toys import TOTAL, Student, make, steps

from halfseen import config, engine_config, engines, optim
from halfseen.checkpoint import Checkpoints, checkpoints, read_weights
from halfseen.checkpoint import folder as layout
from halfseen.config import ConfigError
from halfseen.distributed import World


def state(value=1.0):
    return {
        "model.a": torch.full((8, 4), value),
        "model.b": torch.full((3,), value),
        "scaler.scale": torch.tensor(value),
    }


def written(folder, *positions, keep=10):
    store = Checkpoints(folder / "checkpoints", keep, World())
    for position in positions:
        store.save(position, state(position), {"config": "text"})
    return store


def flip(path, at=-20):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder, **changes):
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def test_what_is_saved_is_loaded(tmp_path):
    store = written(tmp_path, 12800)
    into = state(0.0)
    meta = store.load(store.newest(), into)
    assert meta == {"config": "text", "position": 12800}
    assert store.newest().name == "img_000000012800"
    for key, value in state(12800.0).items():
        assert torch.equal(into[key], value)


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert Checkpoints(tmp_path / "none", 3, World()).newest() is None


def test_a_half_written_checkpoint_does_not_exist_and_is_cleared_by_the_next(tmp_path):
    store = written(tmp_path, 10, 20)
    partial = store.folder / ".partial_img_000000000030"
    shutil.copytree(store.folder / "img_000000000020", partial)
    (partial / "manifest.json").unlink()
    assert store.newest().name == "img_000000000020"
    store.save(30, state(), {})
    assert sorted(path.name for path in store.folder.iterdir()) == [f"img_{p:012d}" for p in (10, 20, 30)]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: flip(folder / "__0_0.distcp"), "content has changed"),
        (lambda folder: flip(folder / ".metadata"), "content has changed"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "missing"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"short"), "5 bytes instead of"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json"),
        (lambda folder: edit(folder, position=19), "content has changed"),
        (lambda folder: edit(folder, meta={"config": "test"}), "content has changed"),
        (lambda folder: edit(folder, digest=None, files={}), "is not a manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, capsys, damage, word):
    store = written(tmp_path, 10, 20)
    damage(store.folder / "img_000000000020")
    assert store.newest().name == "img_000000000010"
    report = capsys.readouterr().err
    assert "img_000000000020" in report
    assert word in report


def test_all_damaged_means_none(tmp_path, capsys):
    store = written(tmp_path, 10)
    flip(store.folder / "img_000000000010" / "__0_0.distcp")
    assert store.newest() is None
    assert "__0_0.distcp" in capsys.readouterr().err


def test_a_run_begins_anew_only_where_it_has_no_checkpoint_at_all(tmp_path):
    assert Checkpoints(tmp_path / "none", 3, World()).to_continue() is None
    store = written(tmp_path, 10, 20)
    flip(store.folder / "img_000000000020" / "__0_0.distcp")
    assert store.to_continue().name == "img_000000000010"
    edit(store.folder / "img_000000000010", format=99)
    with pytest.raises(ConfigError, match=r"none of its 2 checkpoints is healthy.*\n.*remove .*checkpoints to start"):
        store.to_continue()


def test_a_manifest_without_a_digest_of_itself_is_read(tmp_path):
    """As those of the first weeks are."""
    store = written(tmp_path, 10)
    manifest = store.folder / "img_000000000010" / "manifest.json"
    plain = json.loads(manifest.read_text())
    assert len(plain.pop("digest")) == 64
    manifest.write_text(json.dumps(plain))
    assert store.newest().name == "img_000000000010"


def test_of_a_linked_checkpoint_the_link_is_removed(tmp_path):
    """A person has moved it to another disk."""
    store = written(tmp_path, 10, keep=1)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(store.folder / "img_000000000010", elsewhere)
    (store.folder / "img_000000000010").symlink_to(elsewhere)
    (store.folder / ".partial_removed_img_000000000005").symlink_to(elsewhere)  # what an interrupted removal leaves
    assert store.newest().name == "img_000000000010"
    store.save(20, state(), {})
    assert [path.name for path in store.folder.iterdir()] == ["img_000000000020"]
    assert (elsewhere / "manifest.json").exists()


def test_the_newest_keep_are_kept(tmp_path):
    store = written(tmp_path, 10, 20, 30, 40, keep=2)
    assert sorted(path.name for path in store.folder.iterdir()) == ["img_000000000030", "img_000000000040"]


def test_incomplete_ones_do_not_count_as_kept(tmp_path):
    store = written(tmp_path, 10, 20, 30, keep=2)  # 20 and 30 are left
    (store.folder / "img_000000000030" / "__0_0.distcp").unlink()
    store.save(40, state(), {})
    assert (store.folder / "img_000000000020").exists()


def test_a_rotten_later_one_never_pushes_out_the_good_one(tmp_path):
    store = written(tmp_path, 30, keep=1)
    flip(store.folder / "img_000000000030" / "__0_0.distcp")  # same size: only its digest tells
    assert store.newest() is None
    store.save(10, state(), {})
    assert store.newest().name == "img_000000000010"
    store.save(20, state(), {})
    assert store.newest().name == "img_000000000020"
    assert not (store.folder / "img_000000000010").exists()


def test_saving_a_position_again_keeps_a_good_one_and_replaces_a_bad_one(tmp_path):
    store = written(tmp_path, 10)
    manifest = store.folder / "img_000000000010" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    store.save(10, state(), {})
    assert manifest.stat().st_mtime_ns == before
    flip(store.folder / "img_000000000010" / "__0_0.distcp")
    store.save(10, state(10), {})
    assert store.newest().name == "img_000000000010"


def test_a_disk_that_is_too_full_is_noticed_before_writing(tmp_path, monkeypatch):
    store = written(tmp_path, 10)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(OSError, match=r"run\.keep") as error:
        store.save(20, state(), {})
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in store.folder.iterdir()] == ["img_000000000010"]


def test_a_write_that_fails_leaves_the_older_ones(tmp_path, monkeypatch):
    store = written(tmp_path, 10)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        store.save(20, state(), {})
    monkeypatch.undo()
    assert store.newest().name == "img_000000000010"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_really_fills_up_while_writing_costs_no_older_checkpoint(small_disk, monkeypatch, beside):
    """Space that was there when the save began is gone when it is needed."""
    store = Checkpoints(small_disk / "checkpoints", 3, World(), asynchronous=beside)
    large = {"model.a": torch.full((250_000,), 1.0)}  # 1 MB
    with store.writing():
        store.save(10, large, {})
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_600_000))
    with pytest.raises(OSError, match=r"does not fit into .* GiB\. Nothing was written over"):
        store.save(20, large, {})
    monkeypatch.setattr(Checkpoints, "_refuse_full_disk", lambda *arguments: None)  # it saw the space
    with pytest.raises(OSError, match=r"at 20 was not written: .*\(0\.\d MiB free there\)"), store.writing():
        store.save(20, large, {})
    assert [path.name for path in store.folder.iterdir()] == ["img_000000000010"]  # what was begun takes no space
    filler.unlink()
    assert store.newest().name == "img_000000000010"
    into = {"model.a": torch.zeros(250_000)}
    assert store.load(store.newest(), into)["position"] == 10
    assert torch.equal(into["model.a"], large["model.a"])


def test_another_students_checkpoint_is_refused_naming_the_tensor(tmp_path):
    store = written(tmp_path, 10)
    other = state() | {"model.b": torch.zeros(5)}
    with pytest.raises(ConfigError, match=r"model\.b is \[3\] there, this student's is \[5\]"):
        store.load(store.newest(), other)
    with pytest.raises(ConfigError, match=r"model\.c is missing there"):
        store.load(store.newest(), state() | {"model.c": torch.zeros(1)})
    smaller = state()
    del smaller["model.a"]
    with pytest.raises(ConfigError, match=r"model\.a is \[8, 4\] there, this student has none"):
        store.load(store.newest(), smaller)
    assert torch.equal(other["model.a"], state()["model.a"])  # nothing was filled


def test_a_newer_format_is_refused(tmp_path, capsys):
    store = written(tmp_path, 10)
    edit(store.folder / "img_000000000010", format=99)
    assert store.newest() is None
    assert "newer version" in capsys.readouterr().err


def test_a_moved_run_still_loads(tmp_path):
    store = written(tmp_path / "here", 10)
    shutil.move(tmp_path / "here", tmp_path / "there")
    store = Checkpoints(tmp_path / "there" / "checkpoints", 3, World())
    into = state(0.0)
    store.load(store.newest(), into)
    assert torch.equal(into["model.a"], state(10)["model.a"])


def shares(world, folder):
    engine = make(world, "ddp", ema=0.5)
    steps(engine, world, 1)
    store = Checkpoints(folder, 3, world)
    store.save(TOTAL, engine.state(), {})
    return store.newest()


def test_ranks_divide_what_is_replicated(tmp_path):
    path = ranks.run(shares, 2, tmp_path)[1]
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert set(sizes) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert 0.4 < sizes["__0_0.distcp"] / (sizes["__0_0.distcp"] + sizes["__1_0.distcp"]) < 0.6
    assert manifest["world"] == 2


def one_rank_fails(world, folder):
    store = Checkpoints(folder, 3, world)
    if world.rank == 1:
        import torch.distributed.checkpoint.filesystem as written_by

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        written_by.os.fsync = full
    with pytest.raises(OSError, match=r"rank 1: .*No space left"):
        store.save(10, state(), {})
    return store.newest()


def test_a_full_disk_on_one_rank_stops_all(tmp_path):
    assert ranks.run(one_rank_fails, 2, tmp_path / "checkpoints") == [None, None]


def test_a_changed_student_is_told_from_its_checkpoint(tmp_path):
    engine = make(World(), student={"tied": False})
    Checkpoints(tmp_path, 3, World()).save(0, engine.state(), {})
    tied = Student()
    groups = optim.groups(tied, config.Optim())
    other = engines.create(engine_config.Engine(), tied, config.Optim(), groups, World(), 0)
    store = Checkpoints(tmp_path, 3, World())
    with pytest.raises(ConfigError, match=r"layers\.2\.grow\.weight"):
        store.load(store.newest(), other.state())


# ------------------------------------------------------------------------------------------ beside the training


@pytest.fixture
def held(monkeypatch):
    """Writing waits until the event is set."""
    allowed, write = threading.Event(), checkpoints.dcp.save

    def save(*arguments, **options):
        assert allowed.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoints.dcp, "save", save)
    yield allowed
    allowed.set()


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, held):
    store = Checkpoints(tmp_path, 3, World(), asynchronous=True)
    live = state(1.0)
    for position in (10, 20):  # the second save uses the first one's buffers again
        live["model.a"].fill_(position)
        path = store.save(position, live, {})
        assert not path.exists()
        live["model.a"].fill_(-1)
        held.set()
        store.wait()
        assert path.exists()
        into = state(0.0)
        store.load(path, into)
        assert torch.equal(into["model.a"], state(position)["model.a"])
        held.clear()


def test_the_next_save_waits_for_the_one_in_flight(tmp_path, held):
    store = Checkpoints(tmp_path, 3, World(), asynchronous=True)
    first = store.save(10, state(), {})
    flight = store.flight
    threading.Timer(0.2, held.set).start()
    store.save(20, state(), {})
    assert not flight.is_alive()
    assert first.exists()
    assert store.newest().name == "img_000000000020"  # waits, too


def test_a_failure_comes_out_at_the_next_call_and_is_then_over(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, 3, World(), asynchronous=True)
    store.save(10, state(), {})
    store.wait()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for ask in (store.wait, store.newest, lambda: store.save(30, state(), {})):
        with monkeypatch.context() as broken:
            broken.setattr(layout, "write_manifest", full)
            store.save(20, state(), {})
            store.flight.join()
        with pytest.raises(OSError, match=r"at 20 was not written: .*No space left"):
            ask()
        assert [path.name for path in tmp_path.iterdir()] == ["img_000000000010"]
    store.save(20, state(), {})
    assert store.newest().name == "img_000000000020"


def test_nothing_is_in_flight_after_the_block_and_its_own_error_comes_first(tmp_path, monkeypatch, capsys):
    store = Checkpoints(tmp_path, 3, World(), asynchronous=True)
    with store.writing():
        path = store.save(10, state(), {})
    assert path.exists()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layout, "write_manifest", full)

    def goes_wrong():
        with store.writing():
            store.save(20, state(), {})
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        goes_wrong()
    assert "No space left" in capsys.readouterr().err


def saves_beside(world, name, folder):
    """Steps, with collectives of their own, while the writer's collectives run."""
    engine = make(world, name, ema=0.5)
    store = Checkpoints(folder, 3, world, asynchronous=True)
    expected = []
    for step in range(4):
        steps(engine, world, 2, start=2 * step * TOTAL)
        store.save((2 * step + 2) * TOTAL, engine.state(), {})
        expected.append(engine.weights())
    steps(engine, world, 2)
    store.wait()
    return expected


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_training_goes_on_while_ranks_write(tmp_path, name):
    expected = ranks.run(saves_beside, 2, name, tmp_path)[0]
    for step in range(1, 4):
        found = read_weights(tmp_path / f"img_{(2 * step + 2) * TOTAL:012d}")
        for key, value in expected[step].items():
            assert torch.equal(found[key], value), key


def publishing_fails(world, folder, beside):
    store = Checkpoints(folder, 3, world, asynchronous=beside)
    if world.main:

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        layout.write_manifest = full

    def save():
        with store.writing():
            store.save(10, state(), {})

    with pytest.raises(OSError, match=r"rank 0: .*No space left"):
        save()
    return store.newest()


@pytest.mark.parametrize("beside", [False, True])
def test_a_failure_of_rank_0_alone_is_raised_on_all(tmp_path, beside):
    assert ranks.run(publishing_fails, 2, tmp_path / "checkpoints", beside) == [None, None]
