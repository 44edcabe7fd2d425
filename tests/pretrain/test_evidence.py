"""The evidence scripts: what they would run are commands of this tree, and what has finished is not run again."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from halfseen.cli import COMMANDS
from halfseen.pretrain.distill.config import Distill
from halfseen.recipes import load

sys.path.insert(0, str(Path(__file__).parent))

import distillation_evidence
import evidence
import objective_evidence
import parts_evidence
import segmentation_evidence

SCRIPTS = {
    objective_evidence: 2 * (5 + 5),  # stems, each with four objectives and a tokenizer, and five fine-tunings
    distillation_evidence: 3 + 1 + 11,
    parts_evidence: 3 + 2 * 3,
    segmentation_evidence: 1 + 4,
}


def planned(script, folder, monkeypatch, *options):
    """The jobs a script would do with one seed."""
    jobs = {}
    monkeypatch.setattr(evidence.Record, "do", lambda record, job: jobs.setdefault(job.name, job))
    out = ["--out", str(folder / "out.json"), "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["script", str(folder), *out, *options])
    script.main()
    return list(jobs.values())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_command_is_one_of_this_tree(script, tmp_path, monkeypatch):
    few = ("--scenes", "2", "1") if script is segmentation_evidence else ()
    jobs = planned(script, tmp_path, monkeypatch, *few)
    assert len(jobs) == SCRIPTS[script]
    for job in jobs:
        command, *arguments = job.arguments
        module = importlib.import_module(COMMANDS[command][0])
        schema = Distill if command == "teach" else getattr(module, "SCHEMA", None)
        if schema:
            config = load(schema, *arguments[:1], arguments[1:])
            assert command == "teach" or Path(config.run.folder) == job.made


def test_what_has_finished_is_not_run_again(tmp_path):
    made = tmp_path / "out"
    made.mkdir()
    (made / "evaluation.json").write_text(json.dumps({"last": {"val/top1": 0.25, "images": 4}}))
    protocol = argparse.Namespace(seeds=1, out=tmp_path)
    for _ in range(2):
        record = evidence.Record(tmp_path / "kept.json", protocol, lambda record: [{"rows": len(record.runs)}])
        record.do(evidence.Job("one", ("--version",), made))
        first = json.loads((tmp_path / "kept.json").read_text())
        (made / "evaluation.json").unlink(missing_ok=True)  # so that a second run could not find it
    assert first["table"] == [{"rows": 1}]
    assert first["runs"]["one"]["top1"] == 0.25
    assert first["runs"]["one"]["command"] == "halfseen --version"
    with pytest.raises(SystemExit, match="exit code 2 of halfseen nothing"):
        record.do(evidence.Job("two", ("nothing",), made))
    assert "two" not in record.runs


def test_a_row_has_mean_and_sample_deviation_once_all_seeds_are_there(tmp_path):
    record = evidence.Record(tmp_path / "kept.json", argparse.Namespace(), lambda record: [])
    record.runs = {"a-0": {"top1": 0.4}, "a-1": {"top1": 0.5}}
    assert record.figures(["a-0", "a-1"]) == {"top1": [40.0, 50.0], "mean": 45.0, "deviation": 7.07}
    assert record.figures(["a-0", "a-1", "a-2"]) is None


def test_where_a_drawing_is_only_white_around_it_is_left_out():
    data = argparse.Namespace(train="embedded:emoji/train", label="folder", classes=12)
    image, inside, label = next(segmentation_evidence.drawings("embedded:emoji/val", data))
    assert image.size == inside.size
    assert set(inside.tobytes()) == {0, 255}
    assert 1 <= label <= 12
    around = Image.composite(Image.new("RGB", image.size, "white"), image, inside)
    assert min(around.convert("L").tobytes()) > 200
