"""A snapshot is the package as it stands in the working tree, named by its content."""

import os
import subprocess
import sys
import time

import pytest

import halfseen
from halfseen.config import ConfigError
from halfseen.launch import snapshot


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout with a tracked, a changed, an ignored and a new file."""
    root = tmp_path / "checkout"
    for name in (
        "halfseen/__init__.py",
        "halfseen/a.py",
        "pretrain/train.py",
        "configs/pretrain/demo.yaml",
        "docs/a.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / ".gitignore").write_text("*.log\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    (root / "halfseen/a.py").write_text("# changed\n")
    (root / "halfseen/new.py").write_text("# new\n")
    (root / "halfseen/noise.log").write_text("noise\n")
    monkeypatch.setattr(halfseen, "__file__", str(root / "halfseen/__init__.py"))
    monkeypatch.chdir(tmp_path)
    return root


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_what_git_tracks_and_what_changed_as_one_package(checkout, tmp_path):
    taken = snapshot.take(tmp_path / "store")
    assert files(taken) == {
        "snapshot.json",
        "halfseen/__init__.py",
        "halfseen/a.py",
        "halfseen/new.py",
        "halfseen/pretrain/train.py",
        "halfseen/configs/pretrain/demo.yaml",
    }
    assert (taken / "halfseen/a.py").read_text() == "# changed\n"
    assert '"dirty": true' in (taken / "snapshot.json").read_text()


def test_the_same_code_is_kept_once_and_changed_code_anew(checkout, tmp_path):
    first = snapshot.take(tmp_path / "store")
    assert snapshot.take(tmp_path / "store") == first
    (checkout / "pretrain/train.py").write_text("# other\n")
    second = snapshot.take(tmp_path / "store")
    assert second != first
    assert (first / "halfseen/pretrain/train.py").read_text() == "# pretrain/train.py\n"
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == sorted([first.name, second.name])


def test_a_job_passes_its_own_snapshot_on(checkout, tmp_path, monkeypatch):
    taken = snapshot.take(tmp_path / "store")
    monkeypatch.setattr(halfseen, "__file__", str(taken / "halfseen/__init__.py"))
    assert snapshot.take(tmp_path / "elsewhere") == taken


def test_an_installed_package_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(halfseen, "__file__", str(tmp_path / "site-packages/halfseen/__init__.py"))
    assert snapshot.take(tmp_path / "store") is None


def test_old_ones_go_unless_a_job_needs_them(checkout, tmp_path):
    """Asked is about the runs that an old one was launched for, wherever they lie, and about no others."""
    store = tmp_path / "store"
    old = snapshot.take(store)
    snapshot.note(old, ["/runs/a", "/runs/b"])
    (checkout / "halfseen/a.py").write_text("# 2\n")
    needed = snapshot.take(store)
    snapshot.note(needed, ["/runs/c"])
    snapshot.note(needed, ["/elsewhere/d"])
    (checkout / "halfseen/a.py").write_text("# 3\n")
    young = snapshot.take(store)
    snapshot.note(young, ["/runs/e"])
    (store / "mine").mkdir()
    past = time.time() - (snapshot.KEEP_DAYS + 1) * 86400
    for path in (old, needed, store / "mine"):
        os.utime(path, (past, past))
    asked = set()

    def busy(folder):
        asked.add(folder)
        return folder == "/elsewhere/d"

    assert snapshot.prune(store, busy) == [old]
    assert asked <= {"/runs/a", "/runs/b", "/runs/c", "/elsewhere/d"}
    assert {path.name for path in store.iterdir()} == {needed.name, young.name, "mine"}


def test_data_among_the_code_is_refused_by_name(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "MOST", 1000)
    (checkout / "configs/weights.bin").write_bytes(bytes(2000))
    with pytest.raises(ConfigError, match=r"configs/weights\.bin alone") as refused:
        snapshot.take(tmp_path / "store")
    assert "--no-snapshot" in refused.value.fix
    assert not (tmp_path / "store").exists()


def test_a_folder_git_does_not_know_is_refused(checkout, tmp_path):
    (checkout / ".git/HEAD").unlink()
    with pytest.raises(ConfigError, match="--no-snapshot"):
        snapshot.take(tmp_path / "store")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path; launching there is refused")
def test_the_real_package_runs_from_its_snapshot_even_inside_the_checkout(tmp_path):
    """Python puts the current folder first; the job must not."""
    taken = snapshot.take(tmp_path)
    if taken is None:
        pytest.skip("not a git checkout")
    root = os.path.dirname(os.path.dirname(halfseen.__file__))
    words = (
        "import halfseen.pretrain, halfseen.launch.records as r; print(r.__file__); print(halfseen.pretrain.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(taken), "PYTHONSAFEPATH": "1"}
    said = subprocess.run(
        [sys.executable, "-c", words], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert all(line.startswith(str(taken)) for line in said.stdout.splitlines())
