"""What goes wrong after a shard was indexed is noticed at the sample it touches."""

import json
from pathlib import Path

import numpy as np
import pytest

from halfseen.config import ConfigError, Data, Source
from halfseen.data import index as indexes
from halfseen.data import open_set
from halfseen.data.reader import BadLabel, BadSample, LeastRecent, Reader, StaleIndex
from halfseen.data.sources import shards_of
from halfseen.data.writer import ShardWriter


def reader_of(folder: Path, **options) -> Reader:
    return Reader(open_set(Data([Source(str(folder))], **{"classes": 5, **options}), "train"))


def test_bytes_keys_and_labels_come_back(make_shards):
    from webdataset import WebDataset

    folder = make_shards([4, 3])
    reader = reader_of(folder)
    stock = WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
    samples = (reader.read(0, shard, sample) for shard, count in ((0, 4), (1, 3)) for sample in range(count))
    assert [(ours.key, bytes(ours.data), ours.label) for ours in samples] == [
        (s["__key__"], s["jpg"], int(s["cls"])) for s in stock
    ]
    reader.close()


def test_damage_after_indexing_is_found(make_shards):
    folder = make_shards([6])
    path = next(folder.glob("*.tar"))
    sidecar, _ = indexes.ensure(path)
    index = indexes.read(sidecar)
    raw = bytearray(path.read_bytes())
    at = int(index.offset[index.first[2] + 1]) - 512  # the image header of sample 2
    raw[at : at + 512] = bytes(512)
    path.write_bytes(raw)
    reader = reader_of(folder)
    assert reader.read(0, 0, 1).key == "s000001"
    with pytest.raises(BadSample, match="bad header") as bad:
        reader.read(0, 0, 2)
    assert (bad.value.shard, bad.value.key, bad.value.offset) == (path.name, "s000002", at + 512)
    # Cut while open: the descriptor stays valid, the bytes are gone.
    with path.open("r+b") as file:
        file.truncate(int(index.offset[index.first[4]]) - 512)
    with pytest.raises(BadSample, match="ends early"):
        reader.read(0, 0, 5)
    assert reader.read(0, 0, 3).key == "s000003"


def test_a_rewritten_tar_of_the_same_size_stops_the_run(make_shards):
    folder = make_shards([4])
    path = next(folder.glob("*.tar"))
    indexes.ensure(path)
    raw = path.read_bytes()
    with ShardWriter(path) as shard:
        for number in range(4):
            shard.write(f"t{number:06d}", {"jpg": b"x" * 100, "cls": b"0"})
    path.write_bytes(path.read_bytes().ljust(len(raw), b"\0"))
    reader = Reader(open_set(Data([Source(str(folder))]), "train"))
    sidecar = path.with_name(path.name + ".idx.json")
    assert indexes.read_summary(sidecar) is not None
    # ShardWriter renewed the index: put a wrong one there, as a copied sidecar would be.
    text = sidecar.read_text().replace("t000001", "u000001")
    sidecar.write_text(text)
    with pytest.raises(StaleIndex, match="shards index --force"):
        reader.read(0, 0, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"x", "not an integer"), (b"5", "outside 0..4"), (b"-1", "outside"), (b"", "not an integer")],
)
def test_wrong_labels_are_bad_samples(tmp_path, text, reason):
    with ShardWriter(tmp_path / "a.tar") as shard:
        shard.write("a", {"jpg": b"1", "cls": text})
    with pytest.raises(BadSample, match=reason):
        reader_of(tmp_path).read(0, 0, 0)


def test_missing_members_are_bad_samples(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as shard:
        shard.write("a", {"jpg": b"1"})
        shard.write("b", {"cls": b"1", "txt": b"1"})
    reader = reader_of(tmp_path)
    with pytest.raises(BadSample, match=r"member \.cls is missing"):
        reader.read(0, 0, 0)
    with pytest.raises(BadSample, match="no image member"):
        reader.read(0, 0, 1)
    assert reader_of(tmp_path, classes=0).read(0, 0, 0).label == -1


def test_labels_from_json(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as shard:
        shard.write("a", {"jpg": b"1", "json": json.dumps({"meta": {"class": 3}}).encode()})
        shard.write("b", {"jpg": b"1", "json": b"{}"})
    reader = reader_of(tmp_path, label="json:meta.class")
    assert reader.read(0, 0, 0).label == 3
    with pytest.raises(BadSample, match=r"meta\.class"):
        reader.read(0, 0, 1)


def test_labels_from_folders(tmp_path):
    for number, names in enumerate((["dog", "cat"], ["eel", "cat"])):
        with ShardWriter(tmp_path / f"{number}.tar") as shard:
            for name in names:
                shard.write(f"train/{name}/img", {"jpg": b"1"})
    reader = reader_of(tmp_path, label="folder", classes=3)
    assert [reader.read(0, shard, sample).label for shard in (0, 1) for sample in (0, 1)] == [1, 0, 2, 0]
    with pytest.raises(ConfigError, match="3 folders"):
        reader_of(tmp_path, label="folder", classes=4)


def test_keys_without_a_folder_have_no_folder_label(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as shard:
        shard.write("one", {"jpg": b"1"})
    with pytest.raises(ConfigError, match=r"data\.label='folder': no key in data\.train has a folder part\n.*=cls"):
        reader_of(tmp_path, label="folder", classes=3)
    with ShardWriter(tmp_path / "b.tar") as shard:
        shard.write("2/two", {"jpg": b"1"})
    reader = reader_of(tmp_path, label="folder", classes=3)
    assert reader.read(0, 1, 0).label == 2
    with pytest.raises(BadSample, match=r"the key has no folder part, which data\.label=folder reads"):
        reader.read(0, 0, 0)


def test_numeric_folders_are_the_class_even_if_some_are_absent(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as shard:
        shard.write("7/x", {"jpg": b"1"})
        shard.write("03/y", {"jpg": b"1"})
    reader = reader_of(tmp_path, label="folder", classes=10)
    assert [reader.read(0, 0, sample).label for sample in (0, 1)] == [7, 3]


def test_specifications(make_shards, tmp_path):
    folder = make_shards([1, 1, 1])
    everything = sorted(map(str, folder.glob("*.tar")))
    (folder / "list.txt").write_text("# shards\npart-0001.tar\npart-0000.tar\n")
    (folder / "index.json").write_text(json.dumps({"shardlist": [{"url": "part-0002.tar"}]}))
    assert shards_of(str(folder)) == everything
    assert shards_of(f"{folder}/part-*.tar") == everything
    assert shards_of(f"{folder}/part-{{0000..0001}}.tar") == everything[:2]
    assert shards_of(f"file://{everything[1]}") == shards_of(everything[1]) == everything[1:2]
    assert shards_of(f"{folder}/list.txt") == [everything[1], everything[0]]
    assert shards_of(f"{folder}/index.json") == everything[2:]
    assert shards_of("s3://bucket/{a,b}.tar") == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
    assert shards_of("pipe:cat x.tar") == ["pipe:cat x.tar"]


def test_the_embedded_set_opens_with_both_splits():
    data = Data([Source("embedded:emoji/train")], val="embedded:emoji/val", classes=1000)
    assert {Path(path).name.rpartition("-")[0] for path in shards_of("embedded:emoji/train")} == {"train"}
    train, val = open_set(data, "train"), open_set(data, "val")
    assert train.images > val.images > 0
    with pytest.raises(ConfigError, match="no such split"):
        shards_of("embedded:emoji/test")


@pytest.mark.parametrize(
    "spec", ["/nowhere", "/nowhere/*.tar", "/nowhere/{0..3}.tar", "embedded:nothing", "embedded:../../data"]
)
def test_specifications_that_name_nothing_are_refused(spec):
    with pytest.raises(ConfigError):
        shards_of(spec)


def test_a_list_file_cannot_run_commands(tmp_path):
    (tmp_path / "a.txt").write_text("pipe:touch /tmp/never\n")
    (tmp_path / "a.json").write_text(json.dumps({"shardlist": [{"url": "pipe:touch /tmp/never"}]}))
    for name in ("a.txt", "a.json"):
        with pytest.raises(ConfigError, match="shell command"):
            shards_of(str(tmp_path / name))


def test_limit_cuts_each_source_and_changes_the_fingerprint(make_shards):
    folder = make_shards([4, 4])
    every, some = (open_set(Data([Source(str(folder))], limit=limit), "train") for limit in (0, 6))
    assert (every.images, some.images) == (8, 6)
    assert list(some.sources[0].counts) == [4, 2]
    assert every.fingerprint != some.fingerprint


def test_the_bounded_dictionary_drops_the_least_recent():
    dropped: list[str] = []
    store = LeastRecent[str](2, dropped.append)
    for name in "abac":
        store.get(name, lambda name=name: name * 2)
    assert dropped == ["bb"]
    store.forget("a")
    assert dropped == ["bb", "aa"]
    assert list(store.values) == ["c"]


def test_an_empty_evaluation_set_is_refused(make_shards):
    with pytest.raises(ConfigError, match=r"data\.val"):
        open_set(Data([Source(str(make_shards([1])))]), "val")


def test_members_never_become_paths(tmp_path):
    victim = tmp_path / "victim"
    inner = tmp_path / "set"
    inner.mkdir()
    with ShardWriter(inner / "a.tar") as shard:
        shard.write("../victim", {"jpg": b"attack", "cls": b"1"})
        shard.write(str(victim), {"jpg": b"attack", "cls": b"1"})
    reader = reader_of(inner)
    assert {reader.read(0, 0, sample).key for sample in (0, 1)} == {"../victim", str(victim)}
    assert not list(tmp_path.glob("victim*"))
    assert np.array_equal(reader.images.sources[0].counts, [2])


def test_a_label_that_is_a_megabyte_long_is_no_label(make_shards):
    reader = reader_of(make_shards([3], txt=lambda number: b"1".ljust((1 << 20) + (number == 1))), label="txt")
    assert [reader.read(0, 0, sample).label for sample in (0, 2)] == [1, 1]
    with pytest.raises(BadLabel, match=r"\.txt member has 1,048,577 bytes"):
        reader.read(0, 0, 1)


def test_a_negative_cache_size_is_refused():
    with pytest.raises(ConfigError, match=r"data\.cache_gib=-1"):
        Data(cache_gib=-1).check("data")
