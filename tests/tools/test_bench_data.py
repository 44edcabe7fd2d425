"""The data benchmark runs, measures every pair it claims, and its decoders agree; no test looks at a time."""

import json

import numpy as np
import pytest

from halfseen.tools.bench_data import BYTES, Row, interleaved, main, make_shards, noise_picture


def test_a_small_run_reports_every_pair(tmp_path, capsys):
    report = tmp_path / "bench.json"
    assert main(["--samples", "70", "--repeats", "1", "--workers", "0", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    names = [row["name"] for row in result["rows"]]
    assert names.count("read samples, stock headers") == names.count("read samples, plain headers") == 2
    assert {"build an index", "decode + crop, uint8 out", "whole loader"} < set(names)
    assert sum(name == "first batch at 90 %" for name in names) == 2
    assert result["mean_difference_of_255"] <= 0.1
    assert result["mean_bytes"] == pytest.approx(BYTES, rel=0.2)
    assert {"torch", "webdataset", "pillow", "simplejpeg"} < set(result["versions"])
    assert all(row["ours"] > 0 for row in result["rows"])
    output = capsys.readouterr().out
    assert "WebDataset" in output
    assert "met" in output


def test_pictures_look_like_photographs_to_a_jpeg_encoder(tmp_path):
    picture = noise_picture(np.random.default_rng(0)).astype(float)
    neighbours = np.corrcoef(picture[:, 1:].ravel(), picture[:, :-1].ravel())[0, 1]
    assert neighbours > 0.7
    assert make_shards(tmp_path, 3) == pytest.approx(BYTES, rel=0.2)


def test_better_means_a_ratio_above_one_in_either_unit():
    assert Row("a", "images/s per core, CPU", 20, 10).ratio == 2
    assert Row("a", "us CPU/sample", 10, 20).ratio == 2
    assert Row("a", "s", 1).ratio is None


def test_turns_alternate_after_a_warm_up():
    turns: list[str] = []
    clock = iter(range(100))
    works = [lambda name=name: turns.append(name) or 1 for name in "ab"]
    assert interleaved(2, lambda: next(clock), *works) == [1, 1]
    assert turns == ["a", "b", "b", "a", "a", "b"]
