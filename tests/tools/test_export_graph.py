"""Trunks as graphs: another runtime computes the same tokens."""

import pytest
import torch
from torch import nn

from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.hierarchical import TimmConfig
from halfseen.models.swin import SwinConfig
from halfseen.tools import convert, export, export_graph
from halfseen.tools.architecture import Architecture

VIT = {"width": 32, "depth": 2, "heads": 2, "patch": 8}
TRUNKS = {
    "plain": Model(**VIT),
    "hmlp, sincos, parallel": Model(**VIT, stem="hmlp", position="sincos", parallel=2, registers=2),
    "beit, shared blocks": Model(**VIT, relative="shared", key_bias=False, layer_scale=0.1, share=2, position="none"),
    "irpe": Model(**VIT, irpe="product", irpe_on="qkv"),
    "swin": SwinConfig(width=16, depths=[2, 2], heads=[2, 4], window=2),
    "of timm": TimmConfig("pvt_v2_b0", 0.0, {"embed_dims": [8] * 4, "depths": [1] * 4, "num_heads": [1] * 4}),
}


def file_of(folder, cfg):
    """Converted weights that say what they are."""
    architecture = Architecture(cfg, 32, "this test")
    holder = architecture.build()
    torch.manual_seed(0)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.2)
    path = folder / "trunk.safetensors"
    convert.write(holder.state_dict(), path, architecture.described())
    return path, holder.encoder.eval()


@pytest.mark.parametrize("kind", TRUNKS)
def test_a_torch_export_computes_the_same(tmp_path, capsys, kind):
    path, trunk = file_of(tmp_path, TRUNKS[kind])
    out = tmp_path / "trunk.pt2"
    assert export.main([str(path), str(out), "--torch-export"]) == 0
    assert "torch.export computes the same tokens" in capsys.readouterr().out
    image = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(image), trunk(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hmlp, sincos, parallel", "irpe", "swin"])
def test_onnxruntime_computes_the_same(tmp_path, capsys, kind):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install halfseen[onnx]")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install halfseen[onnx]")
    path, trunk = file_of(tmp_path, TRUNKS[kind])
    out = tmp_path / "trunk.onnx"
    assert export.main([str(path), str(out), "--onnx"]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    image = torch.randn(5, 3, 32, 32)
    (found,) = runtime.InferenceSession(str(out)).run(["tokens"], {"image": image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), trunk(image), rtol=1e-4, atol=1e-4)


def test_the_trunk_of_a_classifier_that_pools_the_mean_is_exported_without_a_norm_of_its_own(tmp_path):
    architecture = Architecture(TRUNKS["plain"], 32, "this test")
    student = Classifier(ViT(TRUNKS["plain"], 32), Task(pool="mean"), 5).eval()
    convert.write(student.state_dict(), tmp_path / "fine.safetensors", architecture.described())
    out = tmp_path / "trunk.pt2"
    assert export.main([str(tmp_path / "fine.safetensors"), str(out), "--torch-export"]) == 0
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = torch.export.load(out).module()(image)
        torch.testing.assert_close(student.scores(tokens), student.scores(student.encoder(image)))


def test_a_graph_that_differs_is_removed(tmp_path):
    out = tmp_path / "wrong.onnx"
    out.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"differ by 1 of 1"):
        export_graph.agree([(torch.ones(2), torch.zeros(2))], "a runtime", out)
    assert not out.exists()


def test_weights_that_do_not_say_what_they_are_and_wrong_names_are_refused(tmp_path):
    convert.write({"encoder.x": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match="does not say what model it is of"):
        export.main([str(tmp_path / "bare.safetensors"), str(tmp_path / "out.onnx"), "--onnx"])
    with pytest.raises(ConfigError, match=r"is no \.onnx file"):
        export.main([str(tmp_path), str(tmp_path / "out.pt2"), "--onnx"])
    with pytest.raises(ConfigError, match="a graph is of the trunk alone"):
        export.main([str(tmp_path), str(tmp_path / "out.pt2"), "--torch-export", "--part", "student"])


def test_a_discrete_vae_has_no_trunk_and_the_way_out_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text("stage: pretrain\nobjective: {name: dvae}\n")
    with pytest.raises(ConfigError, match="whose encoder is no trunk") as refused:
        export.main([str(tmp_path), str(tmp_path / "out.pt2"), "--torch-export"])
    assert "target.codes.tokenizer" in refused.value.fix
    assert "--part student" in refused.value.fix
