"""The step benchmark: what it reports, and that it times real training steps."""

import json
import sys

import pytest
import torch

from halfseen.config import ConfigError
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load
from halfseen.tools import bench_step

TINY = [
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "data.image_size=32",
    "objective.mae.decoder_width=16",
    "objective.mae.decoder_depth=1",
    "objective.mae.decoder_heads=2",
    "engine.device=cpu",
]


def test_the_report_has_figures_machine_and_commit(tmp_path, capsys):
    out = tmp_path / "step.json"
    options = ["--precision", "fp32,bf16", "--batch", "2", "--repeats", "3", "--json", str(out)]
    assert bench_step.main([*TINY, *options]) == 0
    result = json.loads(out.read_text())
    assert [(job["name"], job["precision"]) for job in result["jobs"]] == [("halfseen", "fp32"), ("halfseen", "bf16")]
    for job in result["jobs"]:
        assert len(job["all_seconds"]) == 3
        timing = job["seconds"]
        assert 0 < timing["min"] <= timing["q1"] <= timing["median"] <= timing["q3"]
        assert job["images_per_second"] == pytest.approx(2 / timing["median"])
        executed = result["train_flops_per_image"] * 2 / timing["median"] / 1e12
        assert job["tflops"] == pytest.approx(executed)
    assert {"versions", "source", "device", "threads", "batch"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__
    assert "halfseen bf16" in capsys.readouterr().out


def test_a_job_is_a_training_step():
    config = load(Pretrain, None, TINY)
    job = bench_step.create("halfseen", config, 2, "fp32", torch.device("cpu"))
    losses = [job.step().item() for _ in range(40)]
    assert losses[-1] < losses[0]


def test_utilisation_needs_a_known_peak(tmp_path):
    out = tmp_path / "step.json"
    bench_step.main([*TINY, "monitor.peak_tflops=0.5", "--repeats", "1", "--json", str(out)])
    job = json.loads(out.read_text())["jobs"][0]
    assert job["mfu"] == pytest.approx(job["tflops"] / 0.5)


def test_a_missing_peer_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"halfseen\[bench\]"):
        bench_step.main([*TINY, "--against", "transformers"])


def test_an_unknown_peer_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_step.main([*TINY, "--against", "keras"])
    assert "keras" in capsys.readouterr().err


def test_peers_only_do_the_plain_job(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", object())
    with pytest.raises(ConfigError, match=r"model\.stem"):
        bench_step.main([*TINY, "model.stem=hmlp", "--against", "transformers"])


def test_ratios_are_paired_by_round():
    ratio = bench_step.paired([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert (ratio["median"], ratio["of_mins"]) == (2.0, 2.0)


def test_the_bars_are_judged_where_both_sides_were_measured():
    ours = [{"name": "halfseen", "precision": precision} for precision in ("fp32", "bf16")]
    ratio = {"fp32": {"median": 1.10}, "bf16": {"median": 1.99}}
    peer = {"name": "transformers", "precision": "fp32", "ratio": ratio}
    other = {"name": "transformers", "precision": "bf16", "ratio": {"bf16": {"median": 9.0}}}
    judged = bench_step.verdicts([*ours, peer, other])
    assert [(bar["halfseen"], bar["peer"], bar["met"]) for bar in judged] == [
        ("fp32", "transformers fp32", True),
        ("bf16", "transformers fp32", False),
    ]
    assert bench_step.verdicts([*ours, {**peer, "name": "lightly"}]) == []
    assert bench_step.verdicts(ours) == []
