"""Weights come out of runs, checkpoints and files by name, without an engine."""

import argparse

import pytest
import ranks
import torch
from safetensors.torch import save_file
from toys import TOTAL, Student, make, steps

from halfseen.checkpoint import Checkpoints, read_weights
from halfseen.config import ConfigError


def train(world, name, run):
    engine = make(world, name, ema=0.5, student={"frozen": True})
    store = Checkpoints(run / "checkpoints", 3, world)
    for step in range(2):
        steps(engine, world, 1, start=step * TOTAL)
        store.save((step + 1) * TOTAL, engine.state(), {"aliases": engine.aliases})
    return engine.weights(), engine.weights(ema=True)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def trained(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return run, *ranks.run(train, 2, request.param, run)[0]


def test_a_run_gives_its_newest_weights(trained):
    run, weights, averages = trained
    for part, expected in (("model", weights), ("ema", averages)):
        found = read_weights(run, part)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert not torch.equal(weights["head.weight"], averages["head.weight"])
    assert torch.equal(weights["embed.weight"], averages["embed.weight"])  # frozen: no average of its own


def test_a_module_loads_them_strictly_with_tied_names_and_buffers(trained):
    run, weights, _ = trained
    found = read_weights(run)
    student = Student()
    student.load_state_dict(found)
    assert found["layers.2.grow.weight"] is found["layers.0.grow.weight"]
    assert torch.equal(student.head.weight, weights["head.weight"])


def test_the_checkpoints_folder_and_one_checkpoint_work_too(trained):
    run, weights, _ = trained
    assert torch.equal(read_weights(run / "checkpoints")["head.weight"], weights["head.weight"])
    older = read_weights(run / "checkpoints" / f"img_{TOTAL:012d}")
    assert not torch.equal(older["head.weight"], weights["head.weight"])


def test_a_damaged_newest_is_passed_over_with_a_warning(trained, tmp_path):
    import shutil

    shutil.copytree(trained[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"img_{2 * TOTAL:012d}"
    file = newest / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="__1_0"):
        found = read_weights(tmp_path / "run")
    assert not torch.equal(found["head.weight"], trained[1]["head.weight"])
    with pytest.raises(ConfigError, match="__1_0"):
        read_weights(newest)


def test_files_are_read(tmp_path):
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"model": weights, "model_ema": {"a": torch.zeros(3)}, "epoch": 3}, tmp_path / "w.pth")
    torch.save(weights, tmp_path / "bare.pth")
    for name in ("w.safetensors", "w.pth", "bare.pth"):
        assert torch.equal(read_weights(tmp_path / name)["a"], weights["a"])
    assert torch.equal(read_weights(str(tmp_path / "w.pth"), "ema")["a"], torch.zeros(3))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "backbone."])
def test_what_a_wrapper_puts_before_every_name_is_taken_off(tmp_path, wrapper):
    weights = {"a.b": torch.arange(3.0), "c": torch.ones(2)}
    wrapped = {wrapper + name: value for name, value in weights.items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    torch.save({"state_dict": wrapped, "optimizer": {"state": {0: {"step": 1}}}}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert read_weights(tmp_path / name).keys() == weights.keys()
    torch.save(wrapped | {"d": torch.ones(1)}, tmp_path / "w.pth")  # not before every one: it may be a part's name
    assert read_weights(tmp_path / "w.pth").keys() == {*wrapped, "d"}


@pytest.mark.parametrize(
    ("make_it", "part", "reason"),
    [
        (lambda folder: folder / "nothing", "model", "no such file"),
        (lambda folder: folder, "model", "no healthy checkpoint"),
        (lambda folder: _touch(folder / "w.zip"), "model", "unknown kind"),
        (lambda folder: _saved(folder / "w.pth", {"epoch": 3}), "model", "no tensors"),
        (lambda folder: _saved(folder / "w.pth", {"a": torch.ones(1)}), "ema", "none of the keys"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, make_it, part, reason):
    with pytest.raises(ConfigError, match=reason):
        read_weights(make_it(tmp_path), part)


def test_averages_that_were_not_kept_are_refused(tmp_path):
    from halfseen.distributed import World

    Checkpoints(tmp_path, 1, World()).save(0, make(World()).state(), {})
    with pytest.raises(ConfigError, match="averaged"):
        read_weights(tmp_path, "ema")


def test_a_file_with_its_training_options_is_read(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3, name="vit")}, tmp_path / "w.pth")
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], weights["a"])


def test_a_file_of_the_format_before_zip_is_read(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save({"model": weights}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], weights["a"])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    torch.save({"model": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"runs code when it is read \(builtins\.print\)"):
        read_weights(tmp_path / "w.pth")


def _touch(path):
    path.touch()
    return path


def _saved(path, content):
    torch.save(content, path)
    return path


def test_a_run_that_has_not_saved_yet_is_told_from_a_wrong_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"no healthy checkpoint\n  fix: name a run"):
        read_weights(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no healthy checkpoint\n  fix: let the run reach its first save"):
        read_weights(tmp_path)
