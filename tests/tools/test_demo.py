"""The demo runs the real stages end to end, reuses what is done, and stops when asked."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from halfseen.data import evaluation_batches, open_set
from halfseen.data.transforms import evaluation_transform
from halfseen.finetune.config import Finetune
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import changes, load
from halfseen.tools import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.main(["--quick", "--seeds", "1", "--folder", str(folder)]) == 0
    return folder


def test_every_stage_leaves_a_finished_run_and_a_picture(folder: Path) -> None:
    results = json.loads((folder / "demo.json").read_text())
    assert set(results) == {"pretrain", "scratch-0", "pretrained-0"}
    for name in ("scratch-0", "pretrained-0"):
        evaluations = json.loads((folder / name / "evaluation.json").read_text())
        assert results[name]["top1"] == evaluations["last"]["val/top1"]
        assert evaluations["last"]["images"] == 394
    for name in results:
        assert list((folder / name / "tensorboard").iterdir())
    with Image.open(folder / "reconstruction.png") as picture:
        assert picture.width > picture.height / 10 > 0


def test_only_one_arm_starts_from_the_pretrained_weights(folder: Path) -> None:
    pretrained = load(Finetune, folder / "pretrained-0" / "config.yaml")
    scratch = load(Finetune, folder / "scratch-0" / "config.yaml")
    assert pretrained.run.init == str(folder / "pretrain")
    assert scratch.run.init is None
    assert "loaded" in (folder / "pretrained-0" / "console.log").read_text()


def test_a_second_call_runs_nothing_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(demo.Command, "start", start)
    assert demo.main(["--quick", "--seeds", "1", "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 3
    assert "mean" in printed
    assert "tensorboard" in printed


def test_a_failing_stage_is_reported_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = demo.Command("finetune", tmp_path / "run", ("finetune/demo", "data.classes=1"))
    code = demo.run_all([command], demo.Results(tmp_path / "demo.json"), demo.console())
    assert code == 2
    assert "data.classes" in capsys.readouterr().out


def test_the_arms_differ_in_nothing_but_the_weights_and_the_rates() -> None:
    """Equal budget, labels and augmentation: the comparison is worth nothing otherwise."""

    pretrained, scratch = (
        changes(load(Finetune, "finetune/demo")),
        changes(load(Finetune, "finetune/demo_scratch")),
    )
    differing = {key for key in pretrained | scratch if pretrained.get(key) != scratch.get(key)}
    assert differing <= {"optim.lr", "optim.layer_decay"}


def test_pretraining_and_fine_tuning_describe_the_same_trunk() -> None:
    assert load(Pretrain, "pretrain/demo").model == load(Finetune, "finetune/demo").model


def test_the_embedded_set_is_small_and_complete() -> None:
    data = load(Finetune, "finetune/demo").data
    train, val = open_set(data, "train"), open_set(data, "val")
    assert (train.images, val.images) == (1056, 394)
    root = Path(demo.__file__).parents[1] / "halfseen" / "data" / "embedded"
    assert sum(path.stat().st_size for path in root.rglob("*.tar")) <= 2_000_000


def test_train_and_val_share_no_concept() -> None:
    """A concept is a code point; all vendors' drawings and all variants of it belong to one side."""
    data = load(Finetune, "finetune/demo").data
    concepts = {}
    for side in ("train", "val"):
        batches = evaluation_batches(
            open_set(dataclasses.replace(data, val=f"embedded:emoji/{side}"), "val"),
            data, evaluation_transform(8), rank=0, world=1, batch=64, pin=False,
        )  # fmt: skip
        concepts[side] = {key.split("-")[1] for batch in batches for key in batch["key"]}
    assert len(concepts["val"]) > 90
    assert not concepts["train"] & concepts["val"]
