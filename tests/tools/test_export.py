"""The export command: one safetensors file, equal to what the run holds, made in little memory."""

import json
import subprocess
import sys

import pytest
import ranks
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toys import TOTAL, make, steps

from halfseen.checkpoint import Checkpoints, read_weights
from halfseen.checkpoint.stream import bands, stored
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.tools import export


def train(world, name, run):
    engine = make(world, name, ema=0.5)
    steps(engine, world, 2)
    meta = {"aliases": engine.aliases, "config": "stage: toy\n", "engine": name}
    Checkpoints(run / "checkpoints", 3, world).save(2 * TOTAL, engine.state(), meta)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ranks.run(train, 2, request.param, folder)
    return folder


@pytest.mark.parametrize(("part", "read"), [("student", "model"), ("ema", "ema")])
def test_the_file_is_what_the_run_holds(run, tmp_path, part, read):
    out = tmp_path / "w.safetensors"
    assert export.main([str(run), str(out), "--part", part]) == 0
    found, expected = load_file(out), read_weights(run, read)
    assert found.keys() == expected.keys()
    assert "layers.2.grow.weight" in found  # a tied weight, under each of its names
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_it_says_where_it_comes_from(run, tmp_path):
    out = tmp_path / "w.safetensors"
    export.main([str(run), str(out), "--part", "student"])
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert told["position"] == str(2 * TOTAL)
    assert told["config"] == "stage: toy\n"
    assert told["part"] == "student"


def save(folder, state):
    Checkpoints(folder / "checkpoints", 3, World()).save(10, state, {"aliases": {}})


def test_the_encoder_goes_without_its_prefix_and_other_types_survive(tmp_path):
    state = {
        "model.encoder.w": torch.randn(3, 5),
        "model.encoder.half": torch.randn(7).bfloat16(),
        "buffer.encoder.count": torch.tensor(3),
        "buffer.encoder.flags": torch.tensor([True, False, True]),
        "buffer.encoder.none": torch.empty(0, 4),
        "model.decoder.w": torch.ones(2),
        "ema.encoder.w": torch.zeros(3, 5),
    }
    save(tmp_path, state)
    out = tmp_path / "w.safetensors"
    export.main([str(tmp_path), str(out)])
    found = load_file(out)
    assert set(found) == {"w", "half", "count", "flags", "none"}
    for name, value in found.items():
        source = state.get(f"model.encoder.{name}", state.get(f"buffer.encoder.{name}"))
        assert value.dtype == source.dtype
        assert torch.equal(value, source)
    export.main([str(tmp_path), str(out), "--part", "encoder-ema", "--force"])
    assert torch.equal(load_file(out)["w"], state["ema.encoder.w"])
    assert torch.equal(load_file(out)["half"], state["model.encoder.half"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--part", "encoder"], "holds no such weights"),
        (["--part", "ema"], "keeps no averaged weights"),
        (["--part", "encoder-ema"], "keeps no averaged weights"),
    ],
)
def test_a_part_that_is_not_there_is_refused(tmp_path, arguments, reason):
    save(tmp_path, {"model.a": torch.ones(1)})
    with pytest.raises(ConfigError, match=reason):
        export.main([str(tmp_path), str(tmp_path / "w.safetensors"), *arguments])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_file_that_exists_is_not_written_over(run, tmp_path):
    out = tmp_path / "w.safetensors"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        export.main([str(run), str(out), "--part", "student"])
    assert out.read_text() == "precious"


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        export.main([str(run), str(tmp_path / "w.safetensors"), "--part", "student"])
    assert not list(tmp_path.iterdir())


def test_a_sharded_tensor_is_read_in_the_pieces_its_ranks_wrote(run):
    checkpoint = next((run / "checkpoints").iterdir())
    tensor = stored(checkpoint)["model.embed.weight"]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert len(tensor.pieces) == {"ddp": 1, "fsdp": 2}[manifest["meta"]["engine"]]
    assert [len(band) for band in bands(checkpoint, tensor)] == [16 // len(tensor.pieces)] * len(tensor.pieces)


PEAK = """
import sys
from halfseen.tools import export
from pathlib import Path
def peak():  # not getrusage: that begins at what the parent held
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
run = Path(sys.argv[1])
export.main([str(run), str(run / "small.safetensors"), "--part", "encoder"])
before = peak()
export.main([str(run), str(run / "all.safetensors"), "--part", "student"])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """Six large tensors, one of them dominating: the peak grows by one copy of that one."""
    largest = 64 << 20
    state = {f"model.decoder.{n}": torch.ones(largest // 2 // 4) for n in range(5)}
    state |= {"model.decoder.large": torch.ones(largest // 4), "model.encoder.w": torch.ones(4)}
    save(tmp_path, state)
    out = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = int(out.stdout.splitlines()[-1])
    assert 0.5 * largest < grown < 1.4 * largest
