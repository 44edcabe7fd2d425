"""Contracts 1 and 2 through real loaders: one order for any world, workers and split; nothing lost."""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfseen.config import Augment, Data, Source
from halfseen.data import evaluation_batches, index, open_set, reading, train_batches
from halfseen.data.ledger import FREE, BadRecord, Ledger, TooManyBad
from halfseen.data.transforms import evaluation_transform, pretrain_transform
from halfseen.data.writer import ShardWriter
from halfseen.derived import Batches

SEED = 11


def options(folder: Path, **more) -> Data:
    return Data(
        **{
            "train": [Source(str(folder))],
            "classes": 5,
            "workers": 0,
            "prefetch": 2,
            "image_size": 16,
            **more,
        }
    )


def batches_of(data: Data, start: int, split: Batches, rank: int, steps: int, **more) -> list[dict]:
    stream = train_batches(
        open_set(data, "train"),
        data,
        pretrain_transform(Augment(jitter=0.2), data.image_size),
        seed=SEED,
        start=start,
        plan=split,
        rank=rank,
        **more,
    )
    return list(itertools.islice(stream, steps * split.accumulation))


def by_position(batches: list[dict]) -> dict[int, tuple]:
    """position -> (key, label, pixels)"""
    found = {}
    for batch in batches:
        assert batch["image"].dtype == torch.uint8
        for row, position in enumerate(batch["position"].tolist()):
            assert position not in found
            found[position] = (
                batch["key"][row],
                int(batch["label"][row]),
                batch["image"][row].numpy().tobytes(),
            )
    return found


@pytest.fixture
def reference(make_shards) -> tuple[Path, dict[int, tuple]]:
    """A set of 47 samples and what comes at its first 96 positions, read one image at a time."""
    folder = make_shards([20, 1, 26])
    return folder, by_position(batches_of(options(folder), 0, Batches(1, 1, 1, 1), 0, 96))


@pytest.mark.parametrize(
    ("world", "workers", "micro", "accumulation"),
    [
        (1, 0, 24, 1),
        (1, 1, 6, 4),
        (1, 2, 3, 2),
        (2, 0, 4, 3),
        (2, 2, 3, 4),
        (3, 1, 4, 1),
        (3, 0, 2, 2),
        (4, 2, 6, 1),
    ],
)
def test_the_same_image_comes_at_a_position_however_the_run_is_split(reference, world, workers, micro, accumulation):
    folder, expected = reference
    split = Batches(world * micro * accumulation, world, micro, accumulation)
    found: dict[int, tuple] = {}
    for rank in range(world):
        part = by_position(batches_of(options(folder, workers=workers), 0, split, rank, 96 // split.total))
        assert all(position % world == rank for position in part)
        found |= part
    assert found == expected
    assert sorted(key for key, _, _ in (expected[p] for p in range(47))) == [f"s{n:06d}" for n in range(47)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.integers(1, 4),
    micro=st.integers(1, 6),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 47),
    workers=st.sampled_from([0, 0, 0, 0, 1, 2]),  # each process costs; most cases need none
)
def test_no_split_and_no_restart_changes_what_comes_at_a_position(
    reference, world, micro, accumulation, start, workers
):
    folder, expected = reference
    split = Batches(world * micro * accumulation, world, micro, accumulation)
    steps = (96 - start) // split.total
    found: dict[int, tuple] = {}
    for rank in range(world):
        found |= by_position(batches_of(options(folder, workers=workers), start, split, rank, steps))
    assert sorted(found) == list(range(start, start + steps * split.total))
    assert all(found[position] == expected[position] for position in found)


def test_resume_anywhere_with_another_world_and_other_workers(reference):
    folder, expected = reference
    rng = random.Random(0)
    for _ in range(6):
        start, world, workers = rng.randrange(90), rng.choice([1, 2, 3]), rng.choice([0, 0, 1])
        split = Batches(2 * world, world, 2, 1)
        found: dict[int, tuple] = {}
        for rank in range(world):
            found |= by_position(batches_of(options(folder, workers=workers), start, split, rank, 1))
        assert sorted(found) == list(range(start, start + split.total))
        assert all(found[position] == expected[position] for position in found if position in expected)


def test_a_batch_crosses_the_end_of_an_epoch(make_shards):
    batch = batches_of(options(make_shards([5])), 0, Batches(12, 1, 12, 1), 0, 1)[0]
    assert sorted(batch["key"][:5]) == sorted(batch["key"][5:10]) == [f"s{n:06d}" for n in range(5)]


def test_what_a_rank_reads_can_be_said_without_reading(make_shards):
    data, split = options(make_shards([7, 5])), Batches(8, 2, 2, 2)
    words = reading(open_set(data, "train"), data, SEED, split)
    for rank in range(2):
        for number, batch in enumerate(batches_of(data, 16, split, rank, 1)):
            text = words(rank, 16, number)
            assert text.startswith(f"images {batch['position'][0]} to {batch['position'][-1]}: ")
            said = re.findall(r"part-(\d+)\.tar \(samples ([\d, ]+)\)", text)
            found = [7 * int(shard) + int(sample) for shard, samples in said for sample in samples.split(", ")]
            assert sorted(found) == sorted(int(key[1:]) for key in batch["key"])


def test_batches_have_what_the_contract_says(make_shards):
    folder = make_shards([9])
    split = Batches(4, 1, 4, 1)
    batch = batches_of(options(folder), 0, split, 0, 1)[0]
    assert set(batch) == {"image", "position", "label", "key"}
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].is_contiguous()
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["label"].dtype == batch["position"].dtype == torch.int64
    assert batch["label"].tolist() == [int(key[1:]) % 5 for key in batch["key"]]
    assert "label" not in batches_of(options(folder, classes=0), 0, split, 0, 1)[0]
    assert "label" not in batches_of(options(folder, label="none"), 0, split, 0, 1)[0]


# ------------------------------------------------------------------------------------------- bad samples


def hurt(folder: Path) -> set[str]:
    """Damage a set after it was indexed: a header, a picture, a label, a cut. Returns the keys it cost."""
    first, second = sorted(folder.glob("*.tar"))
    index.ensure(first), index.ensure(second)
    entries = index.read(first.with_name(first.name + ".idx.json"))
    raw = bytearray(first.read_bytes())

    def data_of(sample: int, extension: str) -> int:
        return next(offset for name, offset, _ in entries.members(sample) if name == extension)

    raw[data_of(3, "jpg") - 512 : data_of(3, "jpg")] = b"\xa5" * 512
    raw[data_of(8, "jpg") : data_of(8, "jpg") + 200] = bytes(200)
    raw[data_of(12, "cls") : data_of(12, "cls") + 1] = b"9"
    first.write_bytes(raw)
    entries = index.read(second.with_name(second.name + ".idx.json"))
    with second.open("r+b") as file:
        file.truncate(next(entries.members(17))[1] - 512)
    return {"s000003", "s000008", "s000012", "s000037", "s000038", "s000039"}


def without_damage_the_index_sees(folder: Path, data: Data):
    """The set as it was opened before the damage."""
    images = open_set(data, "train")
    lost = hurt(folder)
    return images, lost


def test_bad_samples_are_replaced_alike_everywhere_and_every_one_is_recorded(make_shards, tmp_path):
    folder = make_shards([20, 20])
    data = options(folder, bad_limit=0.5)
    images, lost = without_damage_the_index_sees(folder, data)
    transform = pretrain_transform(Augment(), 16)
    results, rows = [], []
    for world, workers in ((1, 0), (2, 1), (4, 0)):
        found: dict[int, tuple] = {}
        ledger = tmp_path / f"{world}.jsonl"
        split = Batches(20, world, 20 // world, 1)
        for rank in range(world):
            data.workers = workers
            stream = train_batches(
                images, data, transform, seed=SEED, start=0, plan=split, rank=rank, ledger=ledger, pin=False
            )
            found |= by_position(list(itertools.islice(stream, 2)))
        results.append(found)
        rows.append(sorted(ledger.read_text().splitlines()))
    assert results[0] == results[1] == results[2]
    assert rows[0] == rows[1] == rows[2]
    records = [json.loads(row) for row in rows[0]]
    # One epoch of 40 positions: each lost sample was met once as planned, none came through.
    assert {record["key"] for record in records if record["attempt"] == 0} == lost
    keys = [key for key, _, _ in results[0].values()]
    assert not set(keys) & lost
    assert len(keys) == 40
    reasons = {record["key"]: record["reason"] for record in records}
    assert "header" in reasons["s000003"]
    assert "outside 0..4" in reasons["s000012"]
    assert "ends early" in reasons["s000039"]
    assert all(record["shard"].startswith("part-") and record["offset"] > 0 for record in records)


def test_too_many_bad_samples_stop_the_run_and_say_where(tmp_path, jpeg):
    with ShardWriter(tmp_path / "bad.tar") as shard:
        for number in range(40):
            shard.write(f"k{number}", {"jpg": b"not a picture", "cls": b"0"})
    with ShardWriter(tmp_path / "good.tar") as shard:
        for number in range(40):
            shard.write(f"g{number}", {"jpg": jpeg(number), "cls": b"0"})
    with pytest.raises(TooManyBad, match=r"bad\.tar.*not an image.*ledger\.jsonl.*shards check"):
        batches_of(options(tmp_path), 0, Batches(8, 1, 8, 1), 0, 9, ledger=tmp_path / "ledger.jsonl")


def test_a_set_of_nothing_good_ends_instead_of_searching_for_ever(tmp_path):
    with ShardWriter(tmp_path / "bad.tar") as shard:
        shard.write("k", {"jpg": b"not a picture", "cls": b"0"})
    with pytest.raises(TooManyBad, match=r"in a row are bad .*bad\.tar, k at byte \d+: not an image"):
        batches_of(options(tmp_path), 0, Batches(1, 1, 1, 1), 0, 1)


def records(count: int, first: int = 0) -> list[BadRecord]:
    return [BadRecord(first + n, 0, "a.tar", "k", 512, "damaged") for n in range(count)]


def test_the_limit_is_a_share_with_a_floor():
    Ledger(None, 0.001).record(records(1), 10)
    Ledger(None, 0.001).record(records(FREE), 10)
    Ledger(None, 0.01).record(records(100), 10_000)
    with pytest.raises(TooManyBad):
        Ledger(None, 0.001).record(records(FREE + 1), 10)
    with pytest.raises(TooManyBad):
        Ledger(None, 0.01).record(records(101), 10_000)
    with pytest.raises(TooManyBad):
        Ledger(None, 0.0).record(records(1), 10_000)


def test_a_resumed_run_does_not_repeat_lines(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, 1.0).record(records(3), 10)
    path.write_text(path.read_text() + '{"position": 7, "att')  # its writer was killed
    Ledger(path, 1.0).record(records(4, first=2), 10)
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line)["position"])
    assert rows == [0, 1, 2, 3, 4, 5], "the cut line takes no other with it"


def test_what_was_bad_before_a_restart_counts_after_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, 0.01).record(records(FREE), 1000)  # of all ranks; then the run is killed and goes on at 5
    resumed = Ledger(path, 0.001, start=5)
    resumed.record(records(5, first=5), 10)  # the same lines again
    assert len(path.read_text().splitlines()) == FREE
    with pytest.raises(TooManyBad, match="11 bad samples among 25 images"):
        resumed.record(records(1, first=24), 20)
    Ledger(path, 0.001, start=20_000).record(records(1, first=20_000), 10)  # 11 of 20,010 are few


def test_a_resumed_stream_counts_from_the_beginning_of_the_run(tmp_path, jpeg):
    with ShardWriter(tmp_path / "half.tar") as shard:
        for number in range(40):
            content = jpeg(number) if number % 2 else b"not a picture"
            shard.write(f"k{number}", {"jpg": content, "cls": b"0"})

    def stopped_after_every_second_step() -> None:
        for start in range(0, 40, 8):
            batches_of(options(tmp_path), start, Batches(4, 1, 4, 1), 0, 2, ledger=tmp_path / "ledger.jsonl")

    with pytest.raises(TooManyBad):
        stopped_after_every_second_step()


# ------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_evaluation_sees_each_image_once_on_any_world(make_shards, world, batch):
    folder = make_shards([3, 0, 8], classes=11)
    data = options(folder, val=str(folder), classes=11)
    images = open_set(data, "val")
    transform = evaluation_transform(16)
    ranks = [
        list(evaluation_batches(images, data, transform, rank=rank, world=world, batch=batch)) for rank in range(world)
    ]
    found = by_position([each for part in ranks for each in part if len(each["key"])])
    assert [found[position][0] for position in range(11)] == [f"s{n:06d}" for n in range(11)]
    assert [found[position][1] for position in range(11)] == list(range(11))
    assert len({len(part) for part in ranks}) == 1
    assert max(len(each["key"]) for part in ranks for each in part) <= batch
    assert all(each["position"].tolist() == sorted(each["position"].tolist()) for part in ranks for each in part)


def test_evaluation_leaves_bad_samples_out_and_says_so(make_shards, tmp_path):
    folder = make_shards([20, 20])
    data = options(folder, bad_limit=0.5, val=str(folder))
    images = open_set(data, "val")
    lost = hurt(folder)
    ledger = tmp_path / "ledger.jsonl"
    batches = list(evaluation_batches(images, data, evaluation_transform(16), rank=0, world=1, batch=8, ledger=ledger))
    keys = [key for batch in batches for key in batch["key"]]
    assert len(keys) == 34
    assert {json.loads(line)["key"] for line in ledger.read_text().splitlines()} == lost
    assert sum(batch["left_out"] for batch in batches) == len(lost)


def test_a_rank_without_an_evaluation_image_gets_an_empty_batch(make_shards):
    data = options(make_shards([1]), val="unused")
    images = open_set(data, "train")
    (batch,) = evaluation_batches(images, data, evaluation_transform(16), rank=1, world=2, batch=8)
    assert batch["image"].shape == (0, 3, 16, 16)
    assert batch["label"].shape == batch["position"].shape == (0,)
    assert batch["left_out"] == 0


# ------------------------------------------------------------------------------------------- processes


def test_signals_to_the_process_group_do_not_take_the_workers(make_shards):
    data = options(make_shards([30]), workers=2)
    stream = train_batches(
        open_set(data, "train"),
        data,
        pretrain_transform(Augment(), 16),
        seed=0,
        start=0,
        plan=Batches(2, 1, 2, 1),
        rank=0,
    )
    for _ in range(2):  # a batch of each worker, so both have started
        next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(20):
        next(stream)
    assert all(worker.is_alive() for worker in workers)
    stream.close()
    deadline = time.monotonic() + 120
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(worker.is_alive() for worker in workers)


def test_a_rank_that_dies_of_an_error_takes_its_workers_along(make_shards, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import sys\n"
        "from halfseen.config import Augment, Data, Source\n"
        "from halfseen.derived import Batches\n"
        "from halfseen.data import open_set, train_batches\n"
        "from halfseen.data.transforms import pretrain_transform\n"
        "data = Data([Source(sys.argv[1])], workers=1)\n"
        "stream = train_batches(open_set(data, 'train'), data, pretrain_transform(Augment(), 16),\n"
        "                       seed=0, start=0, plan=Batches(2, 1, 2, 1), rank=0)\n"
        "next(stream)\n"
        "raise RuntimeError('on purpose')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(make_shards([4]))], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: on purpose")


def test_a_mixture_reads_each_source_in_its_own_labels(make_shards):
    a, b = make_shards([12], name="a"), make_shards([7], name="b", classes=2)
    data = options(a, train=[Source(str(a), 3.0), Source(str(b), 1.0)])
    images = open_set(data, "train")
    assert images.images == 19
    batch = batches_of(data, 0, Batches(64, 1, 64, 1), 0, 1)[0]
    assert sum(label > 1 for label in batch["label"].tolist()) >= 4


def test_undecoded_bytes_are_available(make_shards, jpeg):
    data = options(make_shards([5]))
    stream = train_batches(open_set(data, "train"), data, None, seed=0, start=0, plan=Batches(3, 1, 3, 1), rank=0)
    for batch in itertools.islice(stream, 3):
        pictures = [batch["data"][begin:end].numpy().tobytes() for begin, end in batch["span"].tolist()]
        assert pictures == [jpeg(int(key[1:])) for key in batch["key"]]
