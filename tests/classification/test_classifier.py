"""The classification student: pooling, losses, layers, what trains."""

import pytest
import torch
import torch.nn.functional as F

from halfseen.classification import Task
from halfseen.classification.classifier import Classifier, binary_cross_entropy, cross_entropy
from halfseen.config import Model, Optim
from halfseen.models import ViT
from halfseen.optim import groups


def tiny(task=None, **model):
    torch.manual_seed(0)
    settings = {"size": "ti", "width": 32, "depth": 4, "heads": 2, "patch": 8, **model}
    return Classifier(ViT(Model(**settings), 16), task or Task(), 5)


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(count, 5, generator=generator).softmax(1)
    return {"image": torch.randn(count, 3, 16, 16, generator=generator), "target": target}


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_training_gives_scalars_and_prediction_gives_features_and_logits(pool):
    student = tiny(Task(pool=pool, head_std=0.5))
    given = batch()
    trained = student(given)
    assert set(trained) == {"loss", "accuracy"}
    assert all(value.shape == () for value in trained.values())
    predicted = student({**given, "task": "predict"})
    assert predicted["features"].shape == (6, 32)
    assert predicted["logits"].shape == (6, 5)
    hits = predicted["logits"].argmax(1) == given["target"].argmax(1)
    assert trained["accuracy"] == hits.float().mean()
    assert torch.allclose(trained["loss"], F.cross_entropy(predicted["logits"], given["target"]))


def test_mean_pooling_leaves_out_prefix_tokens_and_normalises_after_the_mean():
    student = tiny(Task(pool="mean"), registers=2)
    image = batch()["image"]
    raw = student.encoder(image)
    assert raw.shape[1] == 3 + 4
    expected = F.layer_norm(raw[:, 3:].mean(1), (32,), eps=1e-6)
    assert torch.allclose(student.pooled(student.encoder(image)), expected, atol=1e-6)
    assert not any(name.startswith("encoder.norm") for name, _ in student.named_parameters())


def test_class_pooling_takes_the_class_token_after_the_final_norm():
    student = tiny(Task(pool="class"), registers=2)
    image = batch()["image"]
    assert torch.equal(student.pooled(student.encoder(image)), student.encoder(image)[:, 0])
    assert "encoder.norm.weight" in dict(student.named_parameters())


def test_a_new_head_is_small_and_has_no_bias():
    student = tiny(Task(head_std=2e-5))
    assert 1e-5 < student.head.weight.std() < 3e-5
    assert student.head.weight.abs().max() <= 2.0
    assert (student.head.bias == 0).all()


def test_soft_cross_entropy_and_its_gradient_equal_torch():
    given = batch()
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(cross_entropy(logits, given["target"].double()), logits)[0]
    theirs = torch.autograd.grad(F.cross_entropy(logits, given["target"].double()), logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_binary_loss_counts_every_mixed_class_fully():
    logits = torch.randn(2, 3)
    mixed, full = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    expected = -(full * logits.sigmoid().log() + (1 - full) * (-logits).sigmoid().log()).mean()
    assert torch.allclose(binary_cross_entropy(logits, mixed), expected)


def test_layers_are_embeddings_blocks_rest():
    student = tiny(Task(pool="class"), registers=1)
    assert student.layers() == 5
    found = {name: student.layer_of(name) for name, _ in student.named_parameters()}
    for name, layer in found.items():
        part = name.split(".")[1]
        if name.startswith("encoder.blocks."):
            assert layer == int(name.split(".")[2]) + 1, name
        elif name.startswith("encoder.") and part != "norm":
            assert layer == 0, name
        else:
            assert layer == 5, name
    assert set(found.values()) == {0, 1, 2, 3, 4, 5}


def test_rates_fall_by_the_decay_per_layer():
    student = tiny()
    scale = {
        name: group.lr_scale
        for group in groups(student, Optim(layer_decay=0.65), student.layer_of, student.layers())
        for name in group.names
    }
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1
    assert scale["encoder.blocks.3.mlp.fc1.weight"] == pytest.approx(0.65)
    assert scale["encoder.blocks.0.mlp.fc1.weight"] == pytest.approx(0.65**4)
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.cls_token"] == pytest.approx(0.65**5)


def test_blocks_that_share_weights_are_one_layer_and_one_unit():
    student = tiny(share=2)
    assert len(student.blocks()) == 2
    assert student.layers() == 3
    assert student.layer_of("encoder.blocks.1.mlp.fc1.weight") == 2


def test_a_frozen_trunk_neither_trains_nor_drops():
    student = tiny(Task(train="head", head_std=0.5), drop_path=0.9).train()
    assert {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad} == {
        "fc_norm",
        "head",
    }
    assert not student.encoder.training
    assert student.training
    given = batch()
    assert student(given)["loss"] == student(given)["loss"]
    assert student.train_flops_per_image() < tiny().train_flops_per_image()


def test_training_flops_are_three_forwards():
    student = tiny()
    assert student.train_flops_per_image() == 3 * (student.encoder.flops() + 2 * 32 * 5)
