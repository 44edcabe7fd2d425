"""The convert command: files in and out, in every layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfseen.config import ConfigError
from halfseen.tools import convert

GOLDEN = Path(__file__).parents[1] / "golden"


def official(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("case", "layout"),
    [("mae_pretrain_a", "mae"), ("deit_v2_b_parallel_ls_hmlp", "deit"), ("mae_finetune_b_gap", "timm")],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_published_file_comes_back_bit_for_bit(tmp_path, capsys, case, layout, ending):
    published, ours, back = tmp_path / "published.pth", tmp_path / f"ours.{ending}", tmp_path / "back.pth"
    torch.save({"model": official(case), "epoch": 3}, published)
    assert convert.main([str(published), str(ours), "--to", "halfseen"]) == 0
    assert f"{layout} -> halfseen" in capsys.readouterr().out
    assert convert.main([str(ours), str(back), "--from", "halfseen", "--to", layout]) == 0
    assert same(torch.load(back, weights_only=True)["model"], official(case))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["published.pth", ours.name, "back.pth"])


def test_what_has_no_place_in_the_destination_is_named(tmp_path, capsys):
    source, timm = tmp_path / "mae.safetensors", tmp_path / "timm.safetensors"
    save_file(official("mae_pretrain_a"), source)
    convert.main([str(source), str(timm), "--to", "timm"])
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "decoder.pred" in printed
    assert not [name for name in load_file(timm) if "decoder" in name or "mask_token" in name]


def test_names_that_contradict_from_are_refused(tmp_path):
    source = tmp_path / "mae.safetensors"
    save_file(official("mae_pretrain_a"), source)
    with pytest.raises(ConfigError, match="--from='halfseen'"):
        convert.main([str(source), str(tmp_path / "x.pth"), "--from", "halfseen", "--to", "timm"])


def test_an_unknown_kind_of_file_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="no kind of file"):
        convert.main([str(tmp_path / "missing.pth"), str(tmp_path / "x.onnx"), "--to", "timm"])


def test_tied_weights_are_written_under_both_names(tmp_path):
    weight = torch.randn(3, 3)
    convert.write({"a": weight, "b": weight, "c": weight[:1]}, tmp_path / "tied.safetensors")
    assert same(load_file(tmp_path / "tied.safetensors"), {"a": weight, "b": weight, "c": weight[:1]})
