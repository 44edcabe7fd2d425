"""Identity of an image set, and the names of its classes."""

import shutil

import pytest

from halfseen.config import ConfigError, Data, Source
from halfseen.data import open_set
from halfseen.data.writer import ShardWriter


def fingerprint(*sources):
    return open_set(Data([Source(str(shards), weight) for shards, weight in sources]), "train").fingerprint


def test_a_mixture_is_identified_by_weights_order_and_boundaries(make_shards, tmp_path):
    a, b = make_shards([8], name="a"), make_shards([5], name="b")
    known = fingerprint((a, 3), (b, 1))
    assert fingerprint((a, 6), (b, 2)) == known, "the same shares"
    assert fingerprint((a, 3), (b, 2)) != known
    assert fingerprint((b, 1), (a, 3)) != known
    assert fingerprint((b, 3), (a, 1)) != known
    names = ("part-000.tar", "part-001.tar", "part-002.tar")
    three = tmp_path / "three"
    three.mkdir()
    for name, shard in zip(names, [next(a.glob("*.tar")), next(b.glob("*.tar")), next(b.glob("*.tar"))]):
        shutil.copy(shard, three / name)
    one, two, other = f"{three}/part-000.tar", f"{three}/part-001.tar", f"{three}/part-002.tar"
    front, back = f"{three}/part-00[01].tar", f"{three}/part-00[12].tar"
    assert fingerprint((front, 1), (other, 1)) != fingerprint((one, 1), (back, 1)), "a shard changed sides"
    assert fingerprint((front, 1)) != fingerprint((one, 1), (two, 1))


def test_the_weight_of_a_single_source_does_not_matter(make_shards):
    folder = make_shards([8, 2])
    assert fingerprint((folder, 1)) == fingerprint((folder, 5))


# ------------------------------------------------------------------------------------------- names of classes


def named(folder, *names):
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def options(train, val, **more):
    return Data([Source(str(train))], val=str(val), **{"classes": 5, **more})


def test_lists_of_classes_that_differ_are_refused_when_the_evaluation_set_is_opened(make_shards):
    train = named(make_shards([6], name="train"), "ant", "bee", "cat")
    val = named(make_shards([4], name="val"), "ant", "cat")
    with pytest.raises(ConfigError, match=r"class 1 is 'cat' there and 'bee' in (.|\n)*--classes") as refused:
        open_set(options(train, val), "val")
    assert refused.value.key == "data.val"
    open_set(options(train, val), "train")
    open_set(options(train, val, classes=0), "val")
    with pytest.raises(ConfigError, match=r"class 2 is nothing there and 'cat'"):
        open_set(options(train, named(val, "ant", "bee")), "val")
    assert open_set(options(train, named(val, "ant", "bee", "cat")), "val").images == 4


def test_only_what_is_named_on_both_sides_is_compared(make_shards, tmp_path):
    train, val = make_shards([6], name="train"), named(make_shards([4], name="val"), "ant", "cat")
    assert open_set(options(train, val), "val").images == 4
    assert open_set(options(tmp_path / "on another machine", val), "val").images == 4


def test_every_source_of_a_mixture_is_compared(make_shards):
    one, two = (named(make_shards([6], name=name), "ant", "bee") for name in ("one", "two"))
    val = named(make_shards([4], name="val"), "ant", "bee")
    data = options(one, val, classes=2)
    data.train.append(Source(str(two)))
    open_set(data, "val")
    named(two, "bee", "ant")
    with pytest.raises(ConfigError, match=r"/two \(2 and 2 names\)"):
        open_set(data, "val")


def test_folders_of_other_names_are_refused(tmp_path, jpeg):
    for name, folders in (("train", "ab"), ("val", "ac"), ("same", "ba"), ("numbers", "10")):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name / "x.tar") as shard:
            for folder in folders:
                shard.write(f"{folder}/k", {"jpg": jpeg(1)})
    train, by_folder = tmp_path / "train", {"label": "folder", "classes": 2}
    with pytest.raises(ConfigError, match="class 1 is 'c' there and 'b' in"):
        open_set(options(train, tmp_path / "val", **by_folder), "val")
    assert open_set(options(train, tmp_path / "same", **by_folder), "val").folders == ("a", "b")
    assert open_set(options(train, tmp_path / "numbers", **by_folder), "val").folders == ()
