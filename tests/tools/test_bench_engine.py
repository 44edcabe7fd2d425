"""The engine benchmark: real steps and real checkpoints of every engine asked for; no test looks at a time."""

import json
import multiprocessing
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfseen.config import ConfigError
from halfseen.tools import bench_engine

TINY = [
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "data.image_size=32",
    "objective.mae.decoder_width=32",
    "objective.mae.decoder_depth=1",
    "objective.mae.decoder_heads=2",
    "engine.device=cpu",
]


def test_the_report_pairs_every_engine_with_the_plain_step(tmp_path, capsys):
    out = tmp_path / "engines.json"
    chosen = ["--engines", "single,ddp,deepspeed:zero_stage=1", "--ranks", "1,2"]
    few = ["--repeats", "2", "--steps", "2", "--saves", "2", "--batch", "4", "--json", str(out)]
    assert bench_engine.main(["pretrain/demo", *TINY, *chosen, *few]) == 0
    result = json.loads(out.read_text())
    rows = {(row["engine"], row["ranks"]): row for row in result["rows"]}
    several = {("ddp", 2), ("deepspeed:zero_stage=1", 2)}
    assert rows.keys() == {("plain", 1), ("single", 1), ("ddp", 1), ("deepspeed:zero_stage=1", 1)} | several
    plain = rows.pop(("plain", 1))
    assert plain["cpu_seconds_over_plain"]["median"] == 1
    for (_, ranks), row in rows.items():
        assert row["cpu_seconds"]["median"] > 0
        if ranks == 1:  # the same updates of the same weights
            assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for kind in ("waiting", "beside"):
            assert row["checkpoint"][kind]["bytes"] > 4 * 3 * 10_000  # weights and two moments
            assert row["checkpoint"][kind]["blocked_seconds"]["median"] > 0
    assert {"versions", "source", "device", "threads"} <= set(result)
    assert "deepspeed:zero_stage=1" in capsys.readouterr().out
    assert not [child for child in multiprocessing.active_children() if "ForkServer" in type(child).__name__]


def test_an_impossible_engine_is_refused_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(bench_engine.Crew, "started", None)
    with pytest.raises(ConfigError, match=r"engine\.offload.*ignored by ddp"):
        bench_engine.main([*TINY, "--engines", "ddp:offload=true"])
    with pytest.raises(ConfigError, match=r"engine\.name.*'horovod'"):
        bench_engine.main([*TINY, "--engines", "horovod"])


def test_what_only_a_rank_can_refuse_comes_out_as_a_refusal():
    with pytest.raises(ConfigError, match=r"data\.image_size=30.*\n.*fix"):
        bench_engine.main([*TINY, "--engines", "single", "--ranks", "1", "--batch", "1", "data.image_size=30"])


def test_a_rank_that_fails_is_named_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"plain, rank 0 of 1: Traceback (?s:.*)positive integer"):
        bench_engine.main([*TINY, "--engines", "single", "--ranks", "1", "--threads", "-1"])


def test_a_full_device_is_told_from_other_failures(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for failure, kind in ((torch.OutOfMemoryError("CUDA out of memory. Tried to"), MemoryError), (OSError("x"), str)):
        sent = []

        def make(*_, failure=failure):
            raise failure

        pipe, job = SimpleNamespace(send=sent.append), Namespace(threads=1)
        bench_engine.serve(pipe, 0, 1, 0, "pretrain/demo", TINY, "single", job, Path(), make)
        assert [(good, type(answer)) for good, answer in sent] == [(False, kind)]
