"""Evaluation is exact: every image once, whatever the ranks and batches."""

import itertools
import json
import sys
import threading
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.nn.functional as F
from torchvision.io import encode_png

from halfseen import engines, optim
from halfseen.classification.answers import Answers
from halfseen.classification.evaluation import (
    BINS,
    Normalise,
    Result,
    check_labels,
    confusion_picture,
    evaluate,
    open_val,
    worst,
)
from halfseen.config import ConfigError
from halfseen.data.ledger import TooManyBad
from halfseen.data.writer import ShardWriter
from halfseen.finetune import evaluate as module
from halfseen.finetune.config import Finetune
from halfseen.finetune.evaluate import main, report
from halfseen.finetune.train import create_student
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load, to_yaml

CLASSES = 7
IMAGES = 53


EMPTY = {
    "image": torch.empty(0, CLASSES),
    "label": torch.empty(0, dtype=torch.int64),
    "position": torch.empty(0, dtype=torch.int64),
    "key": [],
}


class Ranks:
    """Several ranks as threads, with the two collectives evaluation uses; a rank that waits in vain raises."""

    def __init__(self, world):
        self.world, self.barrier, self.slots = world, threading.Barrier(world), {}

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait(20)
        values = [self.slots[number] for number in range(self.world)]
        self.barrier.wait(20)
        return values

    def member(self, rank):
        return SimpleNamespace(
            rank=rank,
            world=self.world,
            device=torch.device("cpu"),
            main=rank == 0,
            largest=lambda value: max(self.exchange(rank, value)),
            sum=lambda tensor: torch.stack(self.exchange(rank, tensor.clone())).sum(0),
        )

    def run(self, function):
        results, errors = {}, {}

        def body(rank):
            try:
                results[rank] = function(self.member(rank))
            except Exception as error:
                errors[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results, errors


def whole_set():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, CLASSES, generator=generator)
    return logits, torch.randint(0, CLASSES - 1, (IMAGES,), generator=generator)


def share(position, size):
    """Batches over given positions; the 'image' is the row of logits the engine returns."""
    logits, label = whole_set()
    for part in position.split(size):
        yield {"image": logits[part], "label": label[part], "position": part}


class Echo:
    """An engine that predicts the batch's own image, counting how often it is called."""

    def __init__(self):
        self.calls = 0

    def predict(self, batch):
        self.calls += 1
        return {"logits": batch["image"]}


def check(result):
    logits, label = whole_set()
    assert result.count == IMAGES
    assert result.top1 == pytest.approx((logits.argmax(1) == label).double().mean().item(), abs=0)
    best = logits.argsort(1, descending=True)[:, :5]
    assert result.top5 == pytest.approx((best == label[:, None]).any(1).double().mean().item(), abs=0)
    assert result.loss == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-6)
    direct = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for true, predicted in zip(label.tolist(), logits.argmax(1).tolist()):
        direct[true, predicted] += 1
    assert torch.equal(result.confusion, direct)
    confidence, hit = logits.softmax(1).max(1).values, (logits.argmax(1) == label).float()
    error = 0.0
    for low in range(BINS):
        inside = (confidence * BINS).long() == low
        error += abs(float(confidence[inside].sum() - hit[inside].sum())) / IMAGES
    assert result.ece == pytest.approx(error, abs=1e-6)
    per_class = [(logits.argmax(1) == label)[label == k].double().mean() for k in range(CLASSES - 1)]
    assert torch.allclose(result.per_class[:-1], torch.stack(per_class))
    assert result.per_class[-1].isnan(), "a class without images has no accuracy"
    assert result.mean_class == pytest.approx(torch.stack(per_class).mean().item())


@pytest.mark.parametrize(("world", "size"), [(1, 53), (1, 8), (2, 8), (3, 4), (5, 1)])
def test_any_number_of_ranks_and_any_batch_gives_the_direct_result(world, size):
    def one(member):
        position = torch.arange(member.rank, IMAGES, world)
        return evaluate(Echo(), share(position, size), lambda batch: batch, CLASSES, member)

    results, errors = Ranks(world).run(one)
    assert not errors
    for rank in range(world):
        check(results[rank])


def test_ranks_with_very_different_shares_predict_equally_often():
    engines = {0: Echo(), 1: Echo()}

    def one(member):
        position = torch.arange(0, 3) if member.rank else torch.arange(3, IMAGES)
        return evaluate(engines[member.rank], share(position, 4), lambda batch: batch, CLASSES, member)

    results, errors = Ranks(2).run(one)
    assert not errors
    check(results[0])
    check(results[1])
    assert engines[0].calls == engines[1].calls == 13


def test_empty_batches_are_passed_over():
    batches = [EMPTY, *share(torch.arange(IMAGES), 20), EMPTY]
    check(evaluate(Echo(), batches, lambda batch: batch, CLASSES, Ranks(1).member(0)))


def test_fewer_images_than_ranks_are_evaluated_by_all_ranks_together():
    engines = [Echo() for _ in range(3)]

    def one(member):
        batches = [EMPTY] if member.rank else share(torch.arange(IMAGES), 20)
        return evaluate(engines[member.rank], batches, lambda batch: batch, CLASSES, member)

    results, errors = Ranks(3).run(one)
    assert not errors
    for rank in range(3):
        check(results[rank])
    assert [engine.calls for engine in engines] == [3, 3, 3]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_cannot_read_stops_all_of_them(broken):
    def failing():
        yield from itertools.islice(share(torch.arange(IMAGES), 8), 2)
        raise TooManyBad("damaged")

    def one(member):
        batches = failing() if member.rank == broken else share(torch.arange(IMAGES), 8)
        return evaluate(Echo(), batches, lambda batch: batch, CLASSES, member)

    results, errors = Ranks(2).run(one)
    assert not results
    assert isinstance(errors.pop(broken), TooManyBad)
    (other,) = errors.values()
    assert "another rank could not read" in str(other)


def test_a_label_that_is_refused_on_one_rank_stops_all_of_them():
    def one(member):
        def prepare(batch):
            check_labels(batch["label"] + (CLASSES if member.rank else 0), CLASSES)
            return batch

        return evaluate(Echo(), share(torch.arange(IMAGES), 8), prepare, CLASSES, member)

    results, errors = Ranks(2).run(one)
    assert not results
    assert isinstance(errors[1], ConfigError)
    assert "another rank could not read" in str(errors[0])


def test_what_is_left_out_is_counted_over_ranks_and_said():
    def one(member):
        position = torch.arange(member.rank, IMAGES, 2)
        batches = [{**batch, "left_out": 2} for batch in share(position, 20)]
        batches.append({**EMPTY, "left_out": 1})
        return evaluate(Echo(), batches, lambda batch: batch, CLASSES, member)

    results, errors = Ranks(2).run(one)
    assert not errors
    for rank in range(2):
        check(results[rank])
        assert results[rank].left_out == 10
        assert results[rank].scalars("val_ema")["val_ema/left_out"] == 10
        assert "10 of 63 left out: see evaluation-ledger.jsonl in the run folder" in str(results[rank])
    assert "left out" not in str(confused())


def judged(answers, label=(0, 1, 2), keys=("a_1", "b_2", "c_3")):
    """Three images whose best classes are 0, 2 and 1, in this order of five: 0 2 1 3 4, 2 ..., 1 ..."""
    image = torch.tensor([[5.0, 3, 4, 2, 1], [3, 4, 5, 2, 1], [3, 5, 4, 2, 1]])
    batch = {"image": image, "label": torch.tensor(label), "position": torch.arange(3), "key": list(keys)}
    return evaluate(Echo(), [batch], lambda batch: batch, 5, Ranks(1).member(0), answers=answers)


def test_another_sets_labels_are_mapped_and_other_classes_can_be_shut_out():
    assert judged(Answers()).top1 == pytest.approx(1 / 3)
    assert judged(Answers([0, 2, 1])).top1 == 1.0, "label 1 of that set is class 2 here"
    few = Answers([3, 4], only=True)
    assert few.label_count(5) == 2
    result = judged(few, label=(0, 1, 0))
    assert (result.count, result.top1) == (3, pytest.approx(2 / 3)), "3 is likelier than 4 on every image"
    assert judged(Answers([3, 4]), label=(0, 1, 0)).top1 == 0.0


def test_several_right_answers_count_and_images_without_one_do_not():
    for images in ({"a_1": [4, 0], "b_2": [], "c_3": [0]}, [[4, 0], [], [0]]):
        result = judged(Answers(images=images))
        assert (result.count, result.top1, result.top5) == (2, 0.5, 1.0)
        assert result.confusion[0].tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(ConfigError, match="has no number among the answers"):
        judged(Answers(images=[[1]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(("[0, 9]", "does not say a class of 0 to 4"), ("{", "cannot be read"), ('{"label": [1]}', "does not say")),
        *(("[]", "does not say"), ("{}", "does not say"), ("[true]", "does not say"), ('"x"', "does not say")),
        ('{"labels": [1], "omit": 1}', "has other keys"),
    ],
)
def test_a_label_file_that_is_wrong_is_refused(tmp_path, content, message):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"--label-map='.*map\.json': .*{message}"):
        Answers.read(tmp_path / "map.json", None, 5)


@pytest.mark.parametrize("content", ["[]", "{}", '"x"', "[[1], 2]", '{"a": 1}', "[[5]]", "[[1.5]]"])
def test_a_file_of_answers_that_is_wrong_is_refused(tmp_path, content):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ConfigError, match=r"--answers='.*real\.json': does not list classes of 0 to 4"):
        Answers.read(None, tmp_path / "real.json", 5)


def test_label_files_are_read(tmp_path):
    (tmp_path / "map.json").write_text('{"labels": [4, 2], "only": true}')
    (tmp_path / "real.json").write_text('{"x": [1, 2]}')
    answers = Answers.read(tmp_path / "map.json", tmp_path / "real.json", 5)
    assert answers == Answers([4, 2], True, {"x": [1, 2]})
    assert answers.allowed(5).tolist() == [False, False, True, False, True]


def test_a_set_without_a_usable_image_is_refused():
    with pytest.raises(ConfigError, match="none of its 3 images"):
        evaluate(Echo(), [{**EMPTY, "left_out": 3}], lambda batch: batch, CLASSES, Ranks(1).member(0))


def test_top5_of_two_classes_is_everything():
    batch = {
        "image": torch.tensor([[1.0, 0], [0, 1]]),
        "label": torch.tensor([1, 1]),
        "position": torch.arange(2),
    }
    result = evaluate(Echo(), [batch], lambda batch: batch, 2, Ranks(1).member(0))
    assert (result.top1, result.top5) == (0.5, 1.0)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(ConfigError, match=r"data\.classes=3: a sample's label is 3"):
        check_labels(torch.tensor([0, 3, 1]), 3)
    with pytest.raises(ConfigError, match="-1"):
        check_labels(torch.tensor([-1]), 3)
    check_labels(torch.tensor([0, 2]), 3)


def confused():
    matrix = torch.tensor([[8, 1, 1], [0, 10, 0], [4, 6, 0]])
    return Result(30, 0.6, 1.0, 1.0, matrix)


def test_the_worst_classes_come_first_with_what_they_are_taken_for():
    assert worst(confused(), 2) == [(2, 0.0, 10, 1), (0, pytest.approx(0.8), 10, 1)]


def test_the_report_can_be_read_back(tmp_path, capsys):
    report(confused(), tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["images"] == 30
    assert content["val/top1"] == 0.6
    assert content["val/left_out"] == 0
    assert content["confusion"][2] == [4, 6, 0]
    assert content["per_class"] == [0.8, 1.0, 0.0]
    assert "worst classes" in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "side"), [(3, 60), (7, 60), (100, 50)])
def test_the_confusion_picture_is_a_square_dark_on_the_diagonal(classes, side):
    picture = confusion_picture(torch.eye(classes, dtype=torch.int64) * 9, side)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert picture.shape[1] == picture.shape[2] <= side
    step = picture.shape[1]
    assert picture[0].diagonal().float().mean() < 60
    assert (picture[:, 0, step - 1] == 255).all(), "what never happens is white"


def test_rows_of_the_picture_are_true_classes():
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[1, 3] = 5
    picture = confusion_picture(matrix, 4)
    assert picture[0, 1, 3] < 100
    assert (picture[:, 3, 1] == 255).all()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose weights are random, and an evaluation set of nine bad and four good images."""
    pixels = torch.randint(0, 255, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with ShardWriter(tmp_path / "val.tar") as shard:
        for number in range(13):
            content = encode_png(pixels[number % 8]).numpy().tobytes() if number % 3 == 1 else b"not a picture"
            shard.write(f"k{number}", {"png": content, "cls": b"1"})
    options = ["size=ti", "width=32", "depth=1", "heads=2", "patch=16"]
    config = load(
        Finetune,
        None,
        [f"model.{option}" for option in options]
        + ["data.image_size=32", "data.classes=3", "data.workers=0", f"data.val={tmp_path / 'val.tar'}"]
        + ["run.folder=where/it/was", "engine.device=cpu"],
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    weights = create_student(config).state_dict()
    monkeypatch.setattr(module, "read_weights", lambda path, part: weights)
    return tmp_path / "run"


def test_bad_images_of_an_evaluation_are_printed_counted_and_listed(run, tmp_path, capsys):
    report = tmp_path / "numbers.json"
    assert main([str(run), "--batch", "4", "--json", str(report)]) == 0
    assert "over 4 images; 9 of 13 left out: see evaluation-ledger.jsonl" in capsys.readouterr().out
    assert json.loads(report.read_text())["val/left_out"] == 9
    rows = [json.loads(line) for line in (run / "evaluation-ledger.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(13) if number % 3 != 1]
    main([str(run)])
    assert len((run / "evaluation-ledger.jsonl").read_text().splitlines()) == 9, "each is listed once"


def test_predictions_mistakes_and_several_sizes_are_written(run, tmp_path, capsys):
    names = ("predictions.jsonl", "mistakes.png", "confusion.png", "numbers.json")
    listed, mistakes, confusion, numbers = (tmp_path / name for name in names)
    options = ["--predictions", str(listed), "--gallery", str(mistakes), "--confusion", str(confusion)]
    assert main([str(run), *options, "--sizes", "32,48", "--json", str(numbers)]) == 0
    assert "48 px: top-1" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "predictions_32.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["k1", "k4", "k7", "k10"], "in the order of the set"
    content = json.loads(numbers.read_text())["sizes"]["32"]
    assert sum(row["classes"][0] in row["right"] for row in rows) == content["val/top1"] * 4
    assert all(abs(sum(row["probabilities"]) - 1) < 1e-4 for row in rows)
    assert (tmp_path / "mistakes_48.png").read_bytes()[:4] == confusion.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("option", "content", "images"),
    [
        ("--answers", [[2], [], [0, 1], [], [1], [], [], [], [], [2]], 2),  # ReaL's list, by the number in the key
        ("--answers", {"k4": [0, 1, 2], "k7": [0, 1, 2]}, 2),  # the same by key
        ("--label-map", [2, 0, 1], 4),  # V2, Sketch: other numbers of the same classes
        ("--label-map", {"labels": [2, 0, 1], "only": True}, 4),  # A, R: and no other class may be named
    ],
)
def test_other_label_files_are_read_by_the_command(run, tmp_path, option, content, images):
    (tmp_path / "file.json").write_text(json.dumps(content))
    report, listed = tmp_path / "numbers.json", tmp_path / "rows.jsonl"
    assert (
        main([str(run), option, str(tmp_path / "file.json"), "--json", str(report), "--predictions", str(listed)]) == 0
    )
    assert json.loads(report.read_text())["images"] == images
    rights = {row["key"]: row["right"] for row in map(json.loads, listed.read_text().splitlines())}
    if option == "--label-map":
        assert rights == {key: [0] for key in ("k1", "k4", "k7", "k10")}, "the label is 1"
    elif isinstance(content, dict):
        assert rights == {"k1": [], "k4": [0, 1, 2], "k7": [0, 1, 2], "k10": []}
    else:
        assert rights == {"k1": [2], "k4": [], "k7": [], "k10": [2]}


def test_predictions_are_the_same_table_in_parquet(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        assert main([str(run), "--predictions", str(tmp_path / name)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == lines


def test_parquet_without_its_package_is_refused_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow(.|\n)*pip install pyarrow, or write \.jsonl"):
        main([str(run), "--predictions", "p.parquet"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch=0"),
        (["--gallery", "a.jpg"], "picture in PNG"),
        (["--confusion", "nowhere/a.png"], "is in no folder"),
        (["--sizes", "32,40"], "data.image_size=40"),
    ],
)
def test_what_could_only_fail_at_the_end_is_refused_first(run, options, message, capsys):
    with pytest.raises(ConfigError, match=message):
        main([str(run), *options])
    assert "top-1" not in capsys.readouterr().out


def test_a_file_for_predictions_that_cannot_be_written_is_refused_first(run):
    with pytest.raises(ConfigError, match=r"end its name in \.jsonl or \.parquet"):
        main([str(run), "--predictions", "p.csv"])


def test_options_may_come_after_flags(run, capsys):
    assert main([str(run), "--ema", "data.bad_limit=0.9", "--batch", "2", "data.workers=0"]) == 0
    assert "over 4 images" in capsys.readouterr().out


def test_a_pretraining_run_is_named_as_one(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load(Pretrain)))
    with pytest.raises(ConfigError, match=r"is of the stage pretrain(.|\n)*halfseen finetune RECIPE run\.init="):
        main([str(tmp_path)])


def evaluated(world, folder, bad):
    """One rank of an evaluation of two images with sharded weights; rank 1 refuses its own if ``bad``."""
    config = load(Finetune, folder / "config.yaml", [f"data.val={folder.parent / 'two.tar'}", "engine.name=fsdp"])
    config.run.folder = str(folder)
    config.data.bad_limit = 0.0 if bad else 0.5
    torch.manual_seed(0)
    student = create_student(config)
    groups = optim.groups(student, config.optim)
    engine = engines.create(config.engine, student, config.optim, groups, world, 0)
    batches = open_val(config, 4, world)
    try:
        result = evaluate(engine, batches, Normalise(config, world.device), 3, world)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return result.count, result.left_out


def test_ranks_without_an_image_take_part_under_sharding(run):
    with ShardWriter(run.parent / "two.tar") as shard:
        for number in range(2):
            pixels = torch.full((3, 32, 32), 99, dtype=torch.uint8)
            shard.write(f"k{number}", {"png": encode_png(pixels).numpy().tobytes(), "cls": b"1"})
    assert ranks.run(evaluated, 3, run, False) == [(2, 0)] * 3


def test_the_bad_limit_stops_every_rank_and_none_waits(run):
    with ShardWriter(run.parent / "two.tar") as shard:
        for number in range(2):
            pixels = torch.full((3, 32, 32), 99, dtype=torch.uint8)
            content = b"not a picture" if number else encode_png(pixels).numpy().tobytes()
            shard.write(f"k{number}", {"png": content, "cls": b"1"})
    first, second = ranks.run(evaluated, 2, run, True, seconds=60)
    assert second.startswith("TooManyBad: 1 bad samples")
    assert "another rank could not read" in first
    assert ranks.run(evaluated, 2, run, False, seconds=60) == [(1, 1)] * 2
