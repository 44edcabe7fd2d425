"""Indexes agree with tarfile on every flavour of tar, and damage is reported, never swallowed."""

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pytest

from halfseen.data import index as indexes
from halfseen.data.writer import ShardWriter


def members_by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def members_by_index(index: indexes.ShardIndex) -> list[tuple[str, int, int]]:
    return [
        (f"{index.key(sample)}.{extension}", offset, size)
        for sample in range(len(index))
        for extension, offset, size in index.members(sample)
    ]


@pytest.mark.parametrize("flavour", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("depth", [0, 1, 40])
def test_every_tar_flavour_and_name_length(tmp_path, flavour, depth):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=flavour) as tar:
        tar.addfile(tarfile.TarInfo("folder"))
        for number in range(5):
            for extension in ("cls", "seg.png", "jpg"):
                info = tarfile.TarInfo("deep/" * depth + f"img{number}.{extension}")
                info.size, info.mtime = 100 * number, 1.5 if flavour == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(b"x" * info.size))
    index = indexes.build(path)
    assert index.summary.complete
    assert len(index) == 5
    expected = [member for member in members_by_tarfile(path) if "." in member[0]]
    assert members_by_index(index) == expected


def test_non_ascii_names_survive_the_sidecar(tmp_path):
    path = tmp_path / "a.tar"
    with ShardWriter(path) as shard:
        shard.write("hôtel/été", {"jpg": b"1"})
    sidecar, summary = indexes.ensure(path)
    assert indexes.read(sidecar).key(0) == "hôtel/été"
    assert summary.folders == ("hôtel",)


def test_old_headers_without_magic_are_understood(tmp_path):
    path = tmp_path / "v7.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    raw = bytearray(path.read_bytes())
    raw[257:265] = bytes(8)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    assert members_by_index(indexes.build(path)) == [("a.jpg", 512, 3)]


def test_the_writers_index_equals_a_parse_of_the_tar(tmp_path, make_shards):
    path = tmp_path / "ours.tar"
    with ShardWriter(path) as shard:
        for number in range(20):
            name = f"k{number}" if number % 3 else "long/" * 30 + f"k{number}"
            shard.write(name, {"jpg": b"j" * number * 97, "cls": b"1", "json": b"{}"})
    written = path.with_name("ours.tar.idx.json").read_text()
    assert written == indexes.dumps(indexes.build(path))
    assert indexes.build(path).summary.complete


def test_a_failed_write_leaves_nothing(tmp_path):
    def write() -> None:
        with ShardWriter(tmp_path / "a.tar") as shard:
            shard.write("a", {"jpg": b"1"})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_sidecar_round_trip_and_its_first_line(make_shards):
    path = next(make_shards([7]).glob("*.tar"))
    sidecar, summary = indexes.ensure(path)
    assert sidecar == path.with_name(path.name + ".idx.json")
    assert json.loads(sidecar.read_text())["nsamples"] == 7
    assert summary == indexes.read_summary(sidecar) == indexes.read(sidecar).summary
    assert members_by_index(indexes.read(sidecar)) == members_by_tarfile(path)


def test_a_sidecar_is_rebuilt_when_the_size_differs_or_it_is_damaged(make_shards):
    small, large = sorted(make_shards([3, 9]).glob("*.tar"))
    sidecar, _ = indexes.ensure(small)
    os.replace(large, small)
    assert indexes.ensure(small)[1].nsamples == 9
    sidecar.write_text(sidecar.read_text()[:100])
    assert indexes.ensure(small)[1].nsamples == 9


def test_a_folder_that_cannot_be_written_gets_its_indexes_elsewhere(make_shards, monkeypatch, tmp_path):
    path = next(make_shards([3]).glob("*.tar"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    sidecar, summary = indexes.ensure(path)
    assert (tmp_path / "cache") in sidecar.parents
    assert summary.nsamples == 3
    assert not path.with_name(path.name + ".idx.json").exists()
    assert indexes.ensure(path)[0] == sidecar


def test_a_home_that_cannot_be_written_does_not_stop_an_index(make_shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    path = next(make_shards([3]).glob("*.tar"))
    assert indexes.ensure(path)[1].nsamples == 3
    assert (tmp_path / "temporary" / f"halfseen-{os.getuid()}" / "indexes" / "locks").is_dir()


def damaged(folder: Path, change) -> tuple[Path, indexes.ShardIndex]:
    """A shard of ten samples whose bytes went through ``change``, and its index."""
    path = next(folder.glob("*.tar"))
    whole = indexes.build(path)
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw, whole))
    return path, indexes.build(path)


def header_of(index: indexes.ShardIndex, sample: int, member: int = 0) -> int:
    return int(index.offset[index.first[sample] + member]) - 512


def test_a_truncated_shard_keeps_whole_samples_and_reports_the_rest(make_shards, caplog):
    # cls of the sixth sample is there, its jpg is cut: the sample must not appear without its image.
    path, index = damaged(make_shards([10]), lambda raw, whole: raw[: header_of(whole, 5, 1) + 700])
    assert len(index) == 5
    assert not index.summary.complete
    assert "s000005" in index.summary.fault
    assert index.summary.lost == 700
    indexes.ensure(path)
    assert "NOT in the data set" in caplog.text


def test_a_cut_between_samples_is_seen_by_the_missing_end_mark(make_shards):
    _, index = damaged(make_shards([10]), lambda raw, whole: raw[: header_of(whole, 5)])
    assert len(index) == 5
    assert "no end-of-archive mark" in index.summary.fault


@pytest.mark.parametrize("what", ["zeros", "noise", "checksum"])
def test_a_bad_header_in_the_middle_is_reported_and_can_be_rescued(make_shards, what):
    def change(raw: bytearray, whole: indexes.ShardIndex) -> bytearray:
        at = header_of(whole, 4)
        if what == "checksum":
            raw[at] ^= 1
        else:
            raw[at : at + 512] = bytes(512) if what == "zeros" else bytes(range(256)) * 2
        return raw

    path, index = damaged(make_shards([10]), change)
    assert [index.key(sample) for sample in range(len(index))] == [f"s{number:06d}" for number in range(4)]
    assert not index.summary.complete
    assert index.summary.lost == path.stat().st_size - int(index.summary.fault.split()[1].rstrip(":"))
    rescued = indexes.build(path, rescue=True)
    keys = [rescued.key(sample) for sample in range(len(rescued))]
    # The damaged header was that of s000004's label; its image is found, the later samples are whole.
    assert keys == [f"s{number:06d}" for number in range(10)]
    assert [extension for extension, _, _ in rescued.members(4)] == ["jpg"]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_has_no_samples_and_says_why(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    index = indexes.build(path)
    assert len(index) == 0
    assert index.summary.fault


def test_fingerprint_sees_names_sizes_counts_and_order():
    base = [("a.tar", 10, 1), ("b.tar", 20, 2)]
    others = [
        base[::-1],
        base[:1],
        [("a.tar", 11, 1), base[1]],
        [("a.tar", 10, 2), base[1]],
        [("c.tar", 10, 1), base[1]],
    ]
    assert len({indexes.fingerprint(shards) for shards in [base, *others]}) == 6
    assert indexes.fingerprint(base) == indexes.fingerprint(list(base))
