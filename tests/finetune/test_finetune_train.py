"""The fine-tuning stage: what enters the student, what is evaluated and written, what a run leaves."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from halfseen.checkpoint import read_weights
from halfseen.classification import evaluation
from halfseen.classification.evaluation import Result
from halfseen.config import ConfigError
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.finetune import evaluate, train
from halfseen.finetune.config import Finetune
from halfseen.recipes import load

TINY = [
    *("model.width=32", "model.depth=2", "model.heads=2", "model.patch=16", "engine.device=cpu"),
    *(
        "data.train=embedded:emoji/train",
        "data.val=embedded:emoji/val",
        "data.label=folder",
        "data.classes=12",
    ),
    *("data.image_size=32", "data.workers=0", "data.chunk=8", "data.window=8"),
    *("run.global_batch=16", "run.images=64", "run.log_every=16", "optim.warmup=16"),
    *("run.evaluate_every=32", "run.checkpoint_every=32"),
]


def config(*overrides):
    return load(Finetune, None, [*TINY, *overrides])


def raw(position):
    """What the loader hands out for given positions."""
    image = (position[:, None] * 7 + torch.arange(3 * 32 * 32)) % 256
    return {
        "image": image.view(-1, 3, 32, 32).to(torch.uint8),
        "label": position % 9,
        "position": position,
        "key": [str(place) for place in position.tolist()],
    }


@pytest.mark.parametrize(("world", "micro"), [(1, 32), (2, 8), (2, 16), (4, 8)])
def test_what_enters_the_student_does_not_depend_on_the_split(world, micro):
    settings = config("run.global_batch=32", "task.mix_stride=8")
    whole = train.Prepare(settings, Batches(32, 1, 32, 1), torch.device("cpu"))(raw(torch.arange(32)))
    assert whole["image"].dtype == torch.float32
    assert whole["target"].shape == (32, 12)
    batches = Batches(32, world, micro, 32 // world // micro)
    prepare = train.Prepare(settings, batches, torch.device("cpu"))
    for rank in range(world):
        for part in torch.arange(rank, 32, world).split(micro):
            prepared = prepare(raw(part))
            assert torch.equal(prepared["image"], whole["image"][part])
            assert torch.equal(prepared["target"], whole["target"][part])


def test_a_split_that_parts_pairs_is_refused_only_when_images_are_mixed():
    batches = Batches(32, 1, 4, 8)
    with pytest.raises(ConfigError, match="mix_stride"):
        train.Prepare(config("run.global_batch=32"), batches, torch.device("cpu"))
    train.Prepare(config("run.global_batch=32", "augment.mixup=0", "augment.cutmix=0"), batches, torch.device("cpu"))


def test_without_mixing_and_erasing_images_are_only_normalised():
    plain = config("augment.mixup=0", "augment.cutmix=0", "augment.erase=0", "task.smoothing=0")
    prepared = train.Prepare(plain, Batches(16, 1, 16, 1), torch.device("cpu"))(raw(torch.arange(16)))
    assert torch.equal(prepared["target"].argmax(1), torch.arange(16) % 9)
    assert torch.equal(prepared["target"].sum(1), torch.ones(16))
    expected = (raw(torch.arange(16))["image"] / 255 - torch.tensor(plain.augment.mean).view(3, 1, 1)) / torch.tensor(
        plain.augment.std
    ).view(3, 1, 1)
    assert torch.allclose(prepared["image"], expected, atol=1e-5)


class Script:
    """An engine and a monitor in one; evaluation results come from a list."""

    def __init__(self):
        self.notes, self.pictures, self.swapped = [], [], False

    def note(self, text):
        self.notes.append(text)

    def picture(self, position, tag, image):
        self.pictures.append((position, tag, image.dtype))

    @contextmanager
    def averaged(self):
        self.swapped = True
        yield
        self.swapped = False


def evaluations(tmp_path, monkeypatch, script, results, *overrides):
    given = iter(results)

    def fake(engine, batches, prepare, classes, world, sink=None):
        top1 = next(given)
        if sink:
            image, right = torch.zeros(1, 3, 32, 32), torch.tensor([[True, False]])
            sink({"image": image, "position": torch.tensor([3])}, torch.tensor([[0.2, 0.8]]), right)
        # The averaged weights do better, so the file must take them from inside the context.
        top1 += 0.05 if script.swapped else 0.0
        return Result(20, top1, 1.0, 2.0, torch.eye(3, dtype=torch.int64))

    monkeypatch.setattr(evaluation, "evaluate", fake)
    monkeypatch.setattr(evaluation, "open_val", lambda config, batch, world: iter(()))
    return evaluation.Evaluations(config(*overrides), tmp_path, 8, World())


def test_evaluations_are_kept_with_the_best_and_a_resume_drops_later_ones(tmp_path, monkeypatch):
    script = Script()
    once = evaluations(tmp_path, monkeypatch, script, [0.1, 0.3, 0.2, 0.25])
    for position in (16, 32, 48):
        values = once(script, script, position)
    assert values == {"val/top1": 0.2, "val/top5": 1.0, "val/loss": 2.0, "val/mean_class": 1.0, "val/left_out": 0}
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert (content["best"]["position"], content["last"]["position"]) == (32, 48)
    assert content["last"]["images"] == 20
    once(script, script, 32)  # the run was resumed at 16
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert [entry["position"] for entry in content["evaluations"]] == [16, 32]
    assert content["best"]["val/top1"] == 0.25
    assert "top-1 25.00%" in script.notes[-1]
    assert script.pictures[:2] == [(16, "val/confusion", torch.uint8), (16, "val/mistakes", torch.uint8)]


def test_averaged_weights_are_evaluated_too_and_can_be_the_best(tmp_path, monkeypatch):
    script = Script()
    both = evaluations(tmp_path, monkeypatch, script, [0.3, 0.3, 0.32, 0.2], "engine.ema=0.9")
    assert both(script, script, 16)["val_ema/top1"] == pytest.approx(0.35)
    both(script, script, 32)
    assert json.loads((tmp_path / "evaluation.json").read_text())["best"]["position"] == 16


class Weighing(Script):
    """An engine whose weights tell which ones they are: plain ones 0, averages 1, and the evaluation's number."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def weights(self, ema=False):
        self.asked += 1
        return {"w": torch.tensor([float(ema), float(self.asked)])}


def test_the_weights_of_the_best_evaluation_are_kept(tmp_path, monkeypatch):
    script = Weighing()
    once = evaluations(tmp_path, monkeypatch, script, [0.1, 0.3, 0.2, 0.3, 0.4], "task.keep_best=true")
    kept = []
    for position in (16, 32, 48, 64, 80):
        once(script, script, position)
        kept.append(load_file(tmp_path / "best.safetensors")["w"][1].item())
    assert kept == [1, 2, 2, 2, 3], "only a better one replaces it"
    both = evaluations(tmp_path / "ema", monkeypatch, script, [0.1, 0.1], "task.keep_best=true", "engine.ema=0.9")
    (tmp_path / "ema").mkdir()
    both(script, script, 16)
    assert load_file(tmp_path / "ema" / "best.safetensors")["w"][0] == 1, "the averages did better"


def test_keeping_the_best_needs_an_evaluation():
    with pytest.raises(ConfigError, match="nothing is evaluated"):
        config("task.keep_best=true", "data.val=null")


def test_bf16_weights_need_bf16_products():
    with pytest.raises(ConfigError, match=r"task\.frozen='bf16': the forward runs in fp32"):
        config("task.frozen=bf16", "task.train=attention")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run over the embedded images."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    recipe = folder.parent / "tiny.yaml"
    recipe.write_text("")
    code = train.main([str(recipe), *TINY, f"run.folder={folder}", "engine.ema=0.9"])
    return SimpleNamespace(folder=folder, code=code, recipe=recipe)


def test_a_run_leaves_its_config_receipt_metrics_evaluation_and_checkpoint(finished):
    assert finished.code == 0
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
    evaluated = json.loads((finished.folder / "evaluation.json").read_text())["evaluations"]
    assert [entry["position"] for entry in evaluated] == [32, 64]
    assert all("val_ema/top1" in entry for entry in evaluated)
    assert len(json.loads((finished.folder / "receipt.json").read_text())["starts"]) == 1
    assert "head.weight" in read_weights(finished.folder)


def test_a_complete_run_is_left_as_it_is(finished):
    before = (finished.folder / "metrics.jsonl").read_text()
    assert train.main([str(finished.folder)]) == 0
    assert (finished.folder / "metrics.jsonl").read_text() == before
    assert len(json.loads((finished.folder / "receipt.json").read_text())["starts"]) == 2


@pytest.mark.parametrize(("option", "prefix"), [([], "val"), (["--ema"], "val_ema")])
def test_the_command_finds_what_the_run_found(finished, tmp_path, option, prefix, capsys):
    code = evaluate.main([str(finished.folder), *option, "--batch=32", f"--json={tmp_path / 'result.json'}"])
    assert code == 0
    found = json.loads((tmp_path / "result.json").read_text())
    last = json.loads((finished.folder / "evaluation.json").read_text())["last"]
    assert found["images"] == last["images"] > 100
    assert found["val/top1"] == last[f"{prefix}/top1"]
    assert found["val/loss"] == pytest.approx(last[f"{prefix}/loss"], rel=1e-5)
    assert "worst classes" in capsys.readouterr().out


def test_another_run_starts_from_these_weights_and_reports_coverage(finished, tmp_path, capsys):
    arguments = [
        str(finished.recipe),
        *TINY,
        f"run.folder={tmp_path / 'next'}",
        f"run.init={finished.folder}",
    ]
    assert train.main([*arguments, "run.images=16", "optim.warmup=0", "run.evaluate_every=16"]) == 0
    assert "init" in capsys.readouterr().out
