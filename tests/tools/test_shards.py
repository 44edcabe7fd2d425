"""`halfseen shards`: what is built can be trained on, what is broken is found, repair loses nothing good."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfseen.config import ConfigError, Data, Source
from halfseen.data import index as indexes
from halfseen.data import open_set
from halfseen.data.decode import decode
from halfseen.data.reader import Reader
from halfseen.data.writer import ShardWriter
from halfseen.tools.shards import main

CLASSES = ["ant", "bee", "cat"]


def save(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8))
    small.resize(size).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirteen images in three class folders, in two formats, two of them with the same name."""
    root = tmp_path / "pictures"
    for number in range(13):
        extension = "png" if number % 4 == 0 else "jpg"
        save(root / CLASSES[number % 3] / f"img {number % 10}.{number}.{extension}", number)
    return root


def contents(folder: Path, **options) -> dict[str, tuple[bytes, int]]:
    """key -> (image bytes, label)"""
    images = open_set(Data([Source(str(folder))], **{"classes": 1000, **options}), "train")
    reader = Reader(images)
    found: dict[str, tuple[bytes, int]] = {}
    for shard, entry in enumerate(images.sources[0].shards):
        for sample in range(entry.nsamples):
            content = reader.read(0, shard, sample)
            assert content.key not in found
            found[content.key] = (bytes(content.data), content.label)
    reader.close()
    return found


def test_an_image_folder_becomes_shards_with_labels(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["build", str(pictures), str(out), "--shard-size", "5", "--workers", "1"]) == 0
    assert "13 images in 3 shards" in capsys.readouterr().out
    assert (out / "classes.txt").read_text().split() == CLASSES
    files = {path.read_bytes(): CLASSES.index(path.parent.name) for path in pictures.rglob("*.*")}
    assert {data: label for data, label in contents(out).values()} == files
    for shard in out.glob("*.tar"):
        assert shard.with_name(shard.name + ".idx.json").read_text() == indexes.dumps(indexes.build(shard))
    # Classes do not come in a row.
    labels = [label for _, label in contents(out).values()]
    assert labels != sorted(labels)


def test_stock_webdataset_reads_the_shards(pictures, tmp_path):
    from webdataset import WebDataset

    main(["build", str(pictures), str(tmp_path / "out"), "--workers", "1"])
    stock = list(WebDataset([str(path) for path in (tmp_path / "out").glob("*.tar")], shardshuffle=False))
    ours = contents(tmp_path / "out")
    assert {s["__key__"]: int(s["cls"]) for s in stock} == {key: label for key, (_, label) in ours.items()}


def test_shrinking_keeps_shape_and_leaves_small_images_alone(tmp_path):
    save(tmp_path / "in" / "large.jpg", 0, (300, 200))
    save(tmp_path / "in" / "small.png", 1, (70, 60))
    main(["build", str(tmp_path / "in"), str(tmp_path / "out"), "--short-side", "64", "--workers", "1"])
    found = contents(tmp_path / "out", classes=0)
    shapes = {key.split("-")[1]: tuple(decode(data).shape) for key, (data, _) in found.items()}
    assert shapes == {"large": (3, 64, 96), "small": (3, 60, 70)}
    small = next(data for key, (data, _) in found.items() if "small" in key)
    assert small == (tmp_path / "in" / "small.png").read_bytes()


@pytest.mark.parametrize("labels", [["2", "0", "1"], ["dog", "cat", "dog"], None])
def test_a_list_with_or_without_labels(tmp_path, labels):
    for number in range(3):
        save(tmp_path / f"{number}.jpg", number)
    rows = [f"{number}.jpg" + (f",{labels[number]}" if labels else "") for number in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label" if labels else "path", *rows]) + "\n")
    main(["build", str(tmp_path / "list.csv"), str(tmp_path / "out"), "--keep-order", "--workers", "1"])
    found = contents(tmp_path / "out", classes=1000 if labels else 0)
    assert [key for key in found] == [f"{number:08d}-{number}" for number in range(3)]
    expected = {None: [-1, -1, -1], "2": [2, 0, 1], "dog": [1, 0, 1]}[labels[0] if labels else None]
    assert [label for _, label in found.values()] == expected


def test_what_cannot_be_decoded_is_left_out_and_listed(pictures, tmp_path, capsys):
    (pictures / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    assert main(["build", str(pictures), str(tmp_path / "out"), "--workers", "1"]) == 1
    output = capsys.readouterr().out
    assert "1 images were LEFT OUT" in output
    assert "broken.jpg" in output
    assert len(contents(tmp_path / "out")) == 13
    (listed,) = (tmp_path / "out").glob("*.rejected.jsonl")
    assert json.loads(listed.read_text())["origin"].endswith("broken.jpg")


def test_rejected_images_are_tried_again(pictures, tmp_path, capsys):
    (pictures / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    out = tmp_path / "out"
    command = ["build", str(pictures), str(out), "--shard-size", "5", "--workers", "1"]
    assert main(command) == 1
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert main(command) == 1
    save(pictures / "ant" / "broken.jpg", 77)
    assert main(command) == 0
    assert "14 images in 3 shards" in capsys.readouterr().out
    assert len(contents(out)) == 14
    assert not list(out.glob("*.rejected.jsonl"))
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sum(before[name] == after[name] for name in before) == 2, "finished shards are left alone"


def test_a_build_of_nothing_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("missing.jpg,0\nmissing too.jpg,1\n")
    with pytest.raises(ConfigError, match=r"none of its 2 images is usable(.|\n)*missing"):
        main(["build", str(tmp_path / "list.csv"), str(tmp_path / "out"), "--workers", "1"])
    assert not list((tmp_path / "out").glob("*.tar*.idx.json")) + list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(("name", "separator"), [("list.csv", ";"), ("list.csv", "\t"), ("list.tsv", ",")])
def test_a_list_with_another_separator_is_refused(tmp_path, name, separator):
    save(tmp_path / "a.jpg", 1)
    (tmp_path / name).write_text(f"a.jpg{separator}0\n")
    with pytest.raises(ConfigError, match="meant to separate path and label"):
        main(["build", str(tmp_path / name), str(tmp_path / "out"), "--workers", "1"])
    assert not (tmp_path / "out").exists()


def test_a_tsv_has_tabs_and_names_may_have_semicolons(tmp_path):
    for name, text in (("list.tsv", "a;1.jpg\t1\n"), ("list.csv", "a;1.jpg\n")):
        save(tmp_path / "a;1.jpg", 1)
        (tmp_path / name).write_text(text)
        assert main(["build", str(tmp_path / name), str(tmp_path / f"{name} out"), "--workers", "1"]) == 0
    assert [label for _, label in contents(tmp_path / "list.tsv out").values()] == [1]


# ------------------------------------------------------------------------------------------- classes by list


@pytest.mark.parametrize("as_list", [False, True])
def test_a_split_without_a_class_gets_the_numbers_of_the_other(pictures, tmp_path, as_list):
    main(["build", str(pictures), str(tmp_path / "train"), "--workers", "1"])
    save(tmp_path / "few" / "cat" / "x.jpg", 50)
    source = tmp_path / "few"
    if as_list:
        source = tmp_path / "list.csv"
        source.write_text("few/cat/x.jpg,cat\n")
    names = tmp_path / "train" / "classes.txt"
    assert main(["build", str(source), str(tmp_path / "val"), "--classes", str(names), "--workers", "1"]) == 0
    assert [label for _, label in contents(tmp_path / "val").values()] == [2]
    assert (tmp_path / "val" / "classes.txt").read_text() == names.read_text()


def test_classes_that_the_list_does_not_name_are_refused(pictures, tmp_path):
    names = tmp_path / "names.txt"
    command = ["build", str(pictures), str(tmp_path / "out"), "--classes", str(names), "--workers", "1"]
    with pytest.raises(ConfigError, match="no such file"):
        main(command)
    names.write_text("ant\ncat\n")
    with pytest.raises(ConfigError, match=r"1 classes that --classes does not name, e\.g\. 'bee'"):
        main(command)
    names.write_text("ant\nbee\nant\n")
    with pytest.raises(ConfigError, match="names a class twice"):
        main(command)
    names.write_text("ant\nbee\n")
    (tmp_path / "list.csv").write_text("a.jpg,2\n")
    with pytest.raises(ConfigError, match="has label 2, but --classes names 2"):
        main(["build", str(tmp_path / "list.csv"), str(tmp_path / "out"), "--classes", str(names)])


def test_an_interrupted_build_goes_on_and_another_one_is_refused(pictures, tmp_path):
    out, command = (
        tmp_path / "out",
        ["build", str(pictures), str(tmp_path / "out"), "--shard-size", "4", "--workers", "1"],
    )
    main(command)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    lost, cut, _, kept = sorted(before)
    (out / lost).unlink()
    (out / cut).write_bytes(before[cut][0][:2000])
    main(command)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert after[kept] == before[kept]
    with pytest.raises(ConfigError, match="other images or settings"):
        main([*command, "--seed", "1"])
    save(pictures / "ant" / "new.jpg", 99)
    with pytest.raises(ConfigError, match="other images or settings"):
        main(command)


def test_processes_build_the_same_bytes(pictures, tmp_path):
    for workers in ("1", "2"):
        main(["build", str(pictures), str(tmp_path / workers), "--shard-size", "7", "--workers", workers])
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).glob("*.tar")} for n in ("1", "2"))
    assert one == two


def test_a_tar_set_is_cut_anew_with_all_its_members(tmp_path):
    (tmp_path / "in").mkdir()
    with ShardWriter(tmp_path / "in" / "a.tar") as shard:
        for number in range(6):
            save(tmp_path / "x.png", number)
            extra = json.dumps({"class": number}).encode()
            shard.write(f"dir/k{number}", {"png": (tmp_path / "x.png").read_bytes(), "json": extra})
    command = [
        "build",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--label",
        "json:class",
        "--shard-size",
        "4",
    ]
    assert main([*command, "--workers", "1"]) == 0
    found = contents(tmp_path / "out")
    assert {key.split("-")[1]: label for key, (_, label) in found.items()} == {f"k{n}": n for n in range(6)}
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert indexes.build(tmp_path / "out" / "images-000000.tar").extensions == ["cls", "json", "png"]


# ------------------------------------------------------------------------------------------- index, stats


def test_index_writes_sidecars_and_a_list(tmp_path, pictures, capsys):
    out = tmp_path / "out"
    main(["build", str(pictures), str(out), "--shard-size", "7", "--workers", "1"])
    for sidecar in out.glob("*.idx.json"):
        sidecar.unlink()
    assert main(["index", str(out), "--list", str(out / "index.json"), "--workers", "1"]) == 0
    assert len(list(out.glob("*.tar.idx.json"))) == 2
    assert json.loads((out / "index.json").read_text())["shardlist"][0]["nsamples"] == 7
    assert contents(out / "index.json") == contents(out)
    (out / "images-000001.tar").write_bytes((out / "images-000001.tar").read_bytes()[:3000])
    assert main(["index", str(out), "--force", "--workers", "1"]) == 1
    assert "INCOMPLETE" in capsys.readouterr().out


def test_stats(pictures, tmp_path, capsys):
    main(["build", str(pictures), str(tmp_path / "out"), "--workers", "1"])
    report = tmp_path / "stats.json"
    assert main(["stats", str(tmp_path / "out"), "--label", "cls", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    pixels = np.concatenate([decode(path.read_bytes()).numpy().reshape(3, -1) for path in pictures.rglob("*.*")], 1)
    assert result["mean"] == pytest.approx((pixels / 255).mean(1), abs=1e-3)
    assert result["std"] == pytest.approx((pixels / 255).std(1), abs=1e-3)
    assert result["labels"] == {"0": 5, "1": 4, "2": 4}
    assert result["shorter_side"]["median"] == 30
    assert result["images"] == result["samples"] == 13


def test_stats_find_labels_by_themselves_and_say_when_there_are_none(pictures, tmp_path, capsys):
    main(["build", str(pictures), str(tmp_path / "labelled"), "--workers", "1"])
    main(["build", str(pictures / "ant"), str(tmp_path / "plain"), "--workers", "1"])
    assert main(["stats", str(tmp_path / "labelled")]) == 0
    assert "3 labels among them, commonest 0: 5" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "plain")]) == 0
    assert "no sample has a .cls member" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "labelled"), "--label", "none"]) == 0
    assert "label" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_stats_count_folders_by_name(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    save(tmp_path / "x.png", 1)
    with ShardWriter(tmp_path / "in" / "a.tar") as shard:
        for number in range(5):
            shard.write(f"{CLASSES[number % 2]}/k{number}", {"png": (tmp_path / "x.png").read_bytes()})
    assert main(["stats", str(tmp_path / "in"), "--label", "folder"]) == 0
    assert "2 labels among them, commonest ant: 3, bee: 2" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- check


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two shards of ten with one of every kind of damage."""
    folder = tmp_path / "broken"
    folder.mkdir()
    number = 0
    for name in ("a.tar", "b.tar"):
        with ShardWriter(folder / name) as shard:
            for _ in range(10):
                save(tmp_path / "x.png", 3 if number == 7 else number)  # 7: same picture as 3
                data = (tmp_path / "x.png").read_bytes()
                members = {"png": data, "cls": str(number % 4).encode()}
                if number == 1:
                    members["png"] = data[:150]
                if number == 2:
                    members["cls"] = b"seven"
                if number == 5:
                    del members["cls"]
                if number == 6:
                    members["cls"] = b"4"
                shard.write("k8" if number == 9 else f"k{number}", members)  # 9: same key as 8
                number += 1
    index = indexes.build(folder / "b.tar")
    raw = bytearray((folder / "b.tar").read_bytes())
    at = next(index.members(4))[1] - 512
    raw[at : at + 512] = b"\x07" * 512  # k14's first header: the tar's reader would stop here
    last = next(index.members(9))[1]
    (folder / "b.tar").write_bytes(raw[: last + 512 + 700])
    return folder


def test_check_finds_every_kind_of_damage(broken, tmp_path, capsys):
    report = tmp_path / "problems.json"
    command = ["check", str(broken), "--classes", "4", "--json", str(report), "--workers", "1"]
    assert main(command) == 1
    problems = json.loads(report.read_text())
    found = {(problem["shard"], problem["key"], problem["kind"]) for problem in problems}
    assert found == {
        ("a.tar", "k1", "unreadable"),
        ("a.tar", "k2", "label"),
        ("a.tar", "k5", "label"),
        ("a.tar", "k6", "label"),
        ("a.tar", "k7", "duplicate image"),
        ("a.tar", "k8", "duplicate key"),
        ("b.tar", "", "damaged shard"),
        ("b.tar", "", "stale index"),
        ("b.tar", "k14", "label"),
    }
    output = capsys.readouterr().out
    assert "9 problems" in output
    assert "4 x label" in output


def test_repair_keeps_everything_good(broken, tmp_path, capsys):
    out = tmp_path / "repaired"
    command = ["check", str(broken), "--classes", "4", "--repair", str(out), "--workers", "1"]
    assert main(command) == 1
    good = [0, 3, 4, 8, 10, 11, 12, 13, 15, 16, 17, 18]
    assert sorted(contents(out, classes=4)) == sorted(f"k{number}" for number in good)
    assert "12 good samples" in capsys.readouterr().out
    assert main(["check", str(out), "--classes", "4", "--workers", "1"]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="already holds tars"):
        main(command)


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in ("build", "index", "check", "stats"))


def test_an_empty_source_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no image"):
        main(["build", str(tmp_path / "empty"), str(tmp_path / "out")])


@pytest.mark.parametrize(("command", "key"), [("build", "source"), ("stats", "shards"), ("check", "shards")])
def test_shards_that_are_not_there_are_refused_under_the_name_of_the_argument(command, key, tmp_path):
    with pytest.raises(ConfigError, match=f"^{key}='.*nowhere': there is no"):
        main([command, str(tmp_path / "nowhere"), *([str(tmp_path / "out")] if command == "build" else [])])
