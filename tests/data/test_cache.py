"""Remote shards: one download per node, whole or not at all, and nothing in use is evicted."""

import multiprocessing
import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from halfseen.config import Augment, ConfigError, Data, Source
from halfseen.data import index, open_set, train_batches
from halfseen.data.cache import Cache
from halfseen.data.transforms import pretrain_transform
from halfseen.derived import Batches


def counted(shard: Path, log: Path) -> str:
    """A pipe: command that leaves a line per download."""
    return f"pipe:echo {shard.name} >> {log}; sleep 0.1; cat {shard}"


def fetch(arguments: tuple[Path, list[str]]) -> list[int]:
    cache = Cache(arguments[0])
    sizes = []
    for url in arguments[1]:
        opened = cache.open(url, None)
        sizes.append(os.fstat(opened.descriptor).st_size)
        opened.close()
    return sizes


def test_four_processes_fetch_each_shard_once(make_shards, tmp_path):
    shards = sorted(make_shards([3, 4, 5]).glob("*.tar"))
    log = tmp_path / "log"
    urls = [counted(shard, log) for shard in shards]
    jobs = [(tmp_path / "cache", urls[turn % 3 :] + urls[: turn % 3]) for turn in range(4)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(fetch, jobs, chunksize=1)
    sizes = {url: shard.stat().st_size for url, shard in zip(urls, shards)}
    assert results == [[sizes[url] for url in job[1]] for job in jobs]
    assert sorted(log.read_text().split()) == [shard.name for shard in shards]
    assert not list((tmp_path / "cache").glob("*.part-*"))


def test_training_reads_a_remote_set_exactly_as_a_local_one(make_shards, tmp_path):
    folder = make_shards([6, 5])
    remote = f"pipe:cat {folder}/part-000{{0..1}}.tar"
    results = []
    for shards, cache in ((str(folder), None), (remote, str(tmp_path / "cache"))):
        data = Data([Source(shards)], classes=5, workers=0, cache=cache)
        stream = train_batches(
            open_set(data, "train"),
            data,
            pretrain_transform(Augment(), 16),
            seed=0,
            start=3,
            plan=Batches(11, 1, 11, 1),
            rank=0,
        )
        results.append(next(stream))
    assert results[0]["key"] == results[1]["key"]
    assert (results[0]["image"] == results[1]["image"]).all()


def test_http_uses_the_index_beside_the_shard(make_shards, tmp_path):
    folder = make_shards([6, 5])
    for shard in folder.glob("*.tar"):
        index.ensure(shard)
    asked: list[str] = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/part-{{0000..0001}}.tar"
        data = Data([Source(url)], classes=5, workers=0, cache=str(tmp_path / "cache"))
        images = open_set(data, "train")
        assert images.images == 11
        # Opening a set costs two small files, not two shards.
        assert sorted(asked) == ["/part-0000.tar.idx.json", "/part-0001.tar.idx.json"]
        assert images.fingerprint == open_set(Data([Source(str(folder))]), "train").fingerprint
        opened = images.cache.open(images.sources[0].shards[0].url, images.sources[0].shards[0].filesize)
        assert os.fstat(opened.descriptor).st_size == (folder / "part-0000.tar").stat().st_size
        opened.close()
        with pytest.raises(OSError, match="exit"):
            images.cache.open(f"http://127.0.0.1:{server.server_port}/nothing.tar", None)
    finally:
        server.shutdown()
        server.server_close()


def test_a_download_of_another_size_is_not_kept(make_shards, tmp_path):
    shard = next(make_shards([3]).glob("*.tar"))
    cache = Cache(tmp_path / "cache")
    with pytest.raises(OSError, match="gave 700 bytes"):
        cache.open(f"pipe:head -c 700 {shard}", shard.stat().st_size)
    with pytest.raises(OSError, match="no tar file"):
        cache.open("pipe:yes | head -c 2048", None)
    with pytest.raises(OSError, match="exit 3"):
        cache.open(f"pipe:cat {shard}; exit 3", None)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"] * 3


def test_a_shard_that_cannot_be_fetched_is_named_by_its_whole_url(tmp_path):
    pytest.importorskip("fsspec")
    url = "memory://bucket/train-0000.tar"
    with pytest.raises(OSError, match=re.escape(url)):
        Cache(tmp_path).open(url, None)
    assert not list(tmp_path.glob("*.part-*"))


def test_least_recently_used_shards_go_first_and_those_in_use_stay(make_shards, tmp_path):
    shards = sorted(make_shards([3, 3, 3, 3]).glob("*.tar"))
    size = shards[0].stat().st_size
    cache = Cache(tmp_path / "cache", limit=2 * size)
    urls = [f"pipe:cat {shard}" for shard in shards]
    held = cache.open(urls[0], size)
    for moment, url in enumerate(urls[1:3]):
        cache.open(url, size).close()
        os.utime(cache.place(url), (moment + 10, moment + 10))
    os.utime(cache.place(urls[0]), (1, 1))  # oldest, but held
    kept = [cache.place(url).exists() for url in urls]
    assert kept == [True, False, True, False]
    cache.open(urls[3], size).close()
    assert [cache.place(url).exists() for url in urls] == [True, False, False, True]
    held.close()
    cache.open(urls[1], size).close()
    assert [cache.place(url).exists() for url in urls] == [False, True, False, True]


def test_what_a_killed_process_left_is_cleaned_up(make_shards, tmp_path):
    shard = next(make_shards([3]).glob("*.tar"))
    cache, go = Cache(tmp_path / "cache"), tmp_path / "go"
    # Stays in the middle of the file until ``go`` exists.
    url = f"pipe:head -c 600 {shard}; while [ ! -e {go} ]; do sleep 0.02; done; tail -c +601 {shard}"
    process = multiprocessing.get_context("fork").Process(target=fetch, args=((cache.folder, [url]),))
    process.start()
    pattern = f"{cache.place(url).name}.part-*"
    while not list(cache.folder.glob(pattern)):
        assert process.is_alive()
    process.kill()
    process.join()
    go.touch()
    assert len(list(cache.folder.glob(pattern))) == 1
    # The lock died with its holder.
    opened = cache.open(url, shard.stat().st_size)
    assert os.pread(opened.descriptor, 1 << 20, 0) == shard.read_bytes()
    opened.close()
    assert not list(cache.folder.glob(pattern))


def test_remote_shards_need_a_cache_and_their_package(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cache"):
        open_set(Data([Source("http://localhost/a.tar")]), "train")
    with pytest.raises(ConfigError, match=r"pip install halfseen\[remote\]"):
        Cache(tmp_path).open("nosuchscheme://bucket/a.tar", None)


def test_nothing_in_a_url_becomes_a_path(tmp_path):
    cache = Cache(tmp_path)
    for url in (
        "http://h/../../etc/passwd",
        "pipe:cat /etc/passwd",
        "s3://b/.hidden",
        "http://h/" + "x" * 500,
    ):
        place = cache.place(url)
        assert place.parent == tmp_path
        assert "/" not in place.name
        assert len(place.name) < 100
    assert cache.place("http://a/x.tar") != cache.place("http://b/x.tar")
