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
        ({"a": {"recipe": "x", "launch": {"nods": 1}}}, "launch.nods", "no option"),
        ({"a": "pretrain/demo"}, "stages.a", "no mapping"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, stages, key, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        chain.read(write(tmp_path, stages))
    assert refused.value.key == key


def test_a_teacher_s_answers_are_an_input_like_any_other(tmp_path):
    stages = {
        "teacher": {"stage": "finetune", "recipe": "finetune/demo"},
        "teach": {"recipe": "distill/demo", "set": ["teacher.source=${teacher}"]},
        "distill": {"recipe": "distill/demo", "set": ["teacher.source=${teacher}", "store.folder=${teach}"]},
    }
    _, teach, distill = chain.read(write(tmp_path, stages))
    runs = tmp_path / "runs"
    assert teach.arguments[1:] == (f"teacher.source={runs}/teacher", f"store.folder={runs}/teach")
    assert distill.arguments[2:] == (f"store.folder={runs}/teach", f"run.folder={runs}/distill")
    assert distill.after == ("teacher", "teach")


def test_a_chain_whose_inputs_are_yet_to_be_made_passes_pre_flight(tmp_path, capsys):
    """Pretrain, fine-tune a teacher, keep its answers, distil from them, evaluate: nothing of it exists."""
    tiny = ["model.width=32", "model.depth=2", "model.heads=2", "data.image_size=32", "run.images=320"]
    layers = ["distillation.student_layers=[0]", "distillation.teacher_layers=[1]", "teacher.source=${finetune}"]
    stages = {
        "pretrain": {"recipe": "pretrain/demo", "set": tiny},
        "finetune": {"recipe": "finetune/demo", "set": [*tiny, "run.init=${pretrain}"]},
        "teach": {"recipe": "distill/demo", "set": [*tiny, *layers]},
        "distill": {"recipe": "distill/demo", "set": [*tiny, *layers, "store.folder=${teach}"]},
        "evaluate": {"run": "${distill}"},
    }
    path = write(tmp_path, stages, launch="launch/local")
    assert command.main(["chain", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "distill      distill after finetune, teach" in said
    assert "evaluate     evaluate after distill" in said
    assert said.count("is made by a stage above") == 1
    stages["distill"]["set"].append("run.global_batch=33")  # what can be checked is checked
    with pytest.raises(ConfigError, match="does not divide by the 2 ranks"):
        command.main(["chain", str(write(tmp_path, stages, launch="launch/local")), "--dry-run"])


def test_a_chain_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no such file") as refused:
        command.main(["chain", "launch/nochain"])
    assert refused.value.key == "chain"


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

    def prepare(stage, arguments, launch, folder=None, pending=()):
        return Prepared(Task(stage, str(folder)), [])

    def start(task, launch, after=()):
        job = str(100 + len(queued))
        queued.append((task.folder.rsplit("/", 1)[1], job, tuple(after)))
        records.add(task.folder, "queued", job=job, cluster="slurm")
        return job

    monkeypatch.setattr(command, "prepare", prepare)
    monkeypatch.setattr(command, "judge", lambda task, launch: None)
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


def test_a_complete_stage_with_other_options_is_refused(tmp_path, queue):
    """Its results would pass for those of the options that the file has now."""
    queued, _ = queue
    stages = {"pretrain": {"recipe": "pretrain/demo", "set": ["run.seed=1"]}, "evaluate": {"run": "${pretrain}"}}
    folder = tmp_path / "runs/pretrain"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("stage: pretrain\nbase: pretrain/demo\nrun: {seed: 2}\n")
    records.add(folder, "queued", job="7", cluster="slurm")
    records.add(folder, "ended", verdict="complete", reason="", code=0)
    with pytest.raises(ConfigError, match="shapes the curve") as refused:
        launched(write(tmp_path, stages))
    assert refused.value.key == "run.seed"
    assert not queued


def test_the_command_line_may_choose_where_a_chain_runs(tmp_path):
    links = chain.read(write(tmp_path), [], "launch/local")
    assert {link.launch.cluster for link in links} == {"local"}
    assert links[0].launch.minutes == 30


@pytest.mark.parametrize("more", [["--print-sbatch"], ["--after", "7"], ["--sweep", "a.yaml"], ["run.seed=1"]])
def test_what_a_chain_would_leave_unheard_is_refused(tmp_path, queue, more):
    with pytest.raises(ConfigError):
        command.main(["chain", str(write(tmp_path)), *more])
    assert not queue[0]


def test_nothing_is_queued_if_one_stage_is_refused(tmp_path, queue, monkeypatch):
    queued, _ = queue

    def refuse(stage, arguments, launch, folder=None, pending=()):
        if stage == "evaluate":
            raise ConfigError("data.val", None, "names no evaluation set", "name one")
        return Prepared(Task(stage, str(folder)), [])

    monkeypatch.setattr(command, "prepare", refuse)
    with pytest.raises(ConfigError):
        launched(write(tmp_path))
    assert not queued


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_nothing_is_queued_if_slurm_would_refuse_one_stage(tmp_path, queue, monkeypatch, more):
    """A partition that only the last stage names wrongly."""
    queued, _ = queue

    def judge(task, launch):
        if launch.partition == "gpus":
            raise ConfigError("launch.partition", "gpus", "Slurm refuses: invalid partition", "name another")

    monkeypatch.setattr(command, "judge", judge)
    stages = STAGES | {"evaluate": {"run": "${finetune}", "launch": {"partition": "gpus"}}}
    with pytest.raises(ConfigError, match="invalid partition"):
        command.main(["chain", str(write(tmp_path, stages)), *more])
    assert not queued
