"""The receipt: every start of a run says what code, data and machines it used."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from halfseen import receipt
from halfseen.config import ConfigError, Model, Run
from halfseen.receipt import Place, places, read_receipt, write_receipt

WORLD = SimpleNamespace(rank=0, world=1, local_rank=0, device=torch.device("cpu"), main=True)


@dataclass
class Small:
    model: Model = field(default_factory=Model)
    run: Run = field(default_factory=Run)


def write(folder, start=0, **config):
    return write_receipt(folder, config=Small(**config), world=WORLD, fingerprint="abc", start=start)


def test_a_start_says_what_it_was_made_of(tmp_path):
    path = write(tmp_path, model=Model(stem="hmlp"))
    assert path == tmp_path / "receipt.json"
    (entry,) = json.loads(path.read_text())["starts"]
    assert entry["config_changes"] == {"model.stem": "hmlp"}
    assert entry["data"] == {"fingerprint": "abc"}
    assert entry["position"] == 0
    versions = entry["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__
    assert all(versions[name] for name in ("halfseen", "timm", "webdataset", "numpy"))
    assert "pytest" not in versions, "what is only needed to develop does not shape a run"
    assert {"cuda", "driver"} <= versions.keys()
    assert entry["topology"]["world"] == 1
    assert len(entry["topology"]["hosts"]) == 1
    assert entry["topology"]["devices"]
    assert entry["topology"]["nodes"] == 1
    assert entry["time"][:2] == "20"


def test_each_restart_is_appended(tmp_path):
    write(tmp_path)
    write(tmp_path, start=128, run=Run(keep=7))
    starts = read_receipt(tmp_path / "receipt.json")["starts"]
    assert [entry["position"] for entry in starts] == [0, 128]
    assert starts[1]["config_changes"] == {"run.keep": 7}
    assert not list(tmp_path.glob("*.partial"))


def test_every_rank_is_listed_and_nodes_are_counted(tmp_path):
    world = SimpleNamespace(rank=0, world=4, device=torch.device("cpu"), main=True)
    ranks = [Place(rank, f"node{rank // 2}", "NVIDIA H200") for rank in range(4)]
    world.gather_object = lambda own: [own, *ranks[1:]]
    assert [place.rank for place in places(world)] == [0, 1, 2, 3]
    write_receipt(tmp_path, config=Small(), world=world, fingerprint="f", start=0, ranks=ranks)
    topology = read_receipt(tmp_path / "receipt.json")["starts"][0]["topology"]
    assert (topology["world"], topology["nodes"], topology["hosts"]) == (4, 2, ["node0", "node1"])
    assert topology["devices"] == ["NVIDIA H200"]
    assert len(topology["ranks"]) == 4


def test_the_slurm_job_is_recorded(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert receipt.slurm() is None
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write(tmp_path)
    slurm = read_receipt(tmp_path / "receipt.json")["starts"][0]["slurm"]
    assert slurm["job_id"] == "4711"
    assert slurm["restart_count"] == "2"


def checkout(folder):
    """A git checkout with this module in it, and one commit."""
    (folder / "halfseen").mkdir(parents=True)
    (folder / "halfseen" / "receipt.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def test_a_checkout_gives_commit_and_whether_it_is_dirty(tmp_path, monkeypatch):
    checkout(tmp_path)
    monkeypatch.setattr(receipt, "__file__", str(tmp_path / "halfseen" / "receipt.py"))
    clean = receipt.source()
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "halfseen" / "receipt.py").write_text("changed")
    assert receipt.source() == {"commit": clean["commit"], "dirty": True}


def test_an_installed_package_has_no_checkout_and_a_broken_one_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(receipt, "__file__", str(tmp_path / "halfseen" / "receipt.py"))
    assert receipt.source() is None
    (tmp_path / ".git").mkdir()
    broken = receipt.source()
    assert broken["commit"] is None
    assert "git" in broken["reason"]


def test_a_file_that_is_no_receipt_is_refused_and_kept(tmp_path):
    (tmp_path / "receipt.json").write_text("{}")
    with pytest.raises(ConfigError, match="move the file away"):
        write(tmp_path)
    assert (tmp_path / "receipt.json").read_text() == "{}"
