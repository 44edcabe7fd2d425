"""A chain is a list of stages that may name those above them; launching it again continues what is missing."""

import json

import pytest

from halfseen.config import ConfigError
from halfseen.launch import chain, command, jobs, records
from halfseen.launch.command import Prepared
from halfseen.launch.task import Task

STAGES = {
    "pretrain": {"recipe": "pretrain/demo", "launch": {"minutes": 30, "setup": ["module load a"]}},
    "finetune": {"recipe": "finetune/demo", "set": ["run.init=${pretrain}"]},
    "again": {"stage": "finetune", "recipe": "finetune/demo", "after": ["finetune"]},
    "evaluate": {"run": "${finetune}"},
}


def write(tmp_path, stages=STAGES, **more):
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps({"folder": str(tmp_path / "runs"), "launch": "launch/cpu", "stages": stages} | more))
    return path


def test_outputs_are_inputs_and_edges(tmp_path):
    links = chain.read(write(tmp_path), ["partition=gpu"])
    runs = tmp_path / "runs"
    assert [(link.name, link.stage, link.after) for link in links] == [
        ("pretrain", "pretrain", ()),
        ("finetune", "finetune", ("pretrain",)),
        ("again", "finetune", ("finetune",)),
        ("evaluate", "evaluate", ("finetune",)),
    ]
    assert links[1].arguments == ("finetune/demo", f"run.init={runs}/pretrain", f"run.folder={runs}/finetune")
    assert links[3].arguments == (f"{runs}/finetune",)
    assert links[0].launch.minutes == 30
    assert links[0].launch.setup == ["module load a"]
    assert all(link.launch.partition == "gpu" for link in links)


@pytest.mark.parametrize(
    ("stages", "key", "reason"),
    [
        ({"a": {"recipe": "pretrain/demo", "set": ["run.init=${b}"]}}, "stages.a", "no stage 'b'"),
        ({"a": {"recipe": "x", "run": "y"}}, "stages.a", "exactly one"),
        ({"a": {"recipe": "x", "sets": []}}, "stages.a.sets", "no such key"),
        ({"a": {"recipe": "x", "launch": {"nods": 1}}}, "nods", "no option"),
        ({"a": "pretrain/demo"}, "stages.a", "no mapping"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, stages, key, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        chain.read(write(tmp_path, stages))
    assert refused.value.key == key


def test_a_file_that_is_no_chain_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("stage: pretrain\n")
    with pytest.raises(ConfigError, match="has no stages"):
        chain.read(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="no such key"):
        chain.read(write(tmp_path, stagess={}))


@pytest.fixture
def queue(monkeypatch):
    """Launches that only write down what they are asked; numbers count from 100."""
    queued = []

    def prepare(stage, arguments, launch, folder=None):
        return Prepared(Task(stage, str(folder)), [])

    def start(task, launch, after=()):
        job = str(100 + len(queued))
        queued.append((task.folder.rsplit("/", 1)[1], job, tuple(after)))
        records.add(task.folder, "queued", job=job, cluster="slurm")
        return job

    monkeypatch.setattr(command, "prepare", prepare)
    monkeypatch.setattr(command, "start", start)
    active = {}
    monkeypatch.setattr(jobs, "active", lambda folder: active.get(str(folder).rsplit("/", 1)[1], ("", "")))
    return queued, active


def launched(path):
    return command.main(["chain", str(path)])


def test_a_chain_is_queued_once_and_goes_on_from_what_is_missing(tmp_path, queue, capsys):
    queued, active = queue
    assert launched(write(tmp_path)) == 0
    assert queued == [
        ("pretrain", "100", ()),
        ("finetune", "101", ("100",)),
        ("again", "102", ("101",)),
        ("evaluate", "103", ("101",)),
    ]
    queued.clear()
    # Pretraining is done, fine-tuning runs, what waited for it was cancelled.
    records.add(tmp_path / "runs/pretrain", "ended", verdict="complete", reason="", code=0)
    records.add(tmp_path / "runs/again", "ended", verdict="failed", reason="disk full", code=1)
    active["finetune"] = ("101", "RUNNING")
    capsys.readouterr()
    assert launched(write(tmp_path)) == 0
    assert queued == [("again", "100", ("101",)), ("evaluate", "101", ("101",))]
    said = capsys.readouterr().out
    assert "pretrain     complete" in said
    assert "again        again; before: disk full" in said


def test_nothing_is_queued_if_one_stage_is_refused(tmp_path, queue, monkeypatch):
    queued, _ = queue

    def refuse(stage, arguments, launch, folder=None):
        if stage == "evaluate":
            raise ConfigError("data.val", None, "names no evaluation set", "name one")
        return Prepared(Task(stage, str(folder)), [])

    monkeypatch.setattr(command, "prepare", refuse)
    with pytest.raises(ConfigError):
        launched(write(tmp_path))
    assert not queued
