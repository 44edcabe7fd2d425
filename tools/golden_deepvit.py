"""DeepViT: re-attention in evaluation and in training, its batch norm's statistics, gradients."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from halfseen.classification import Task
from halfseen.classification.classifier import Classifier
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.models.reattention import ReAttention

from .golden import (
    TRUNK,
    Case,
    Check,
    Family,
    epsilon,
    gradients,
    image_size,
    in_double,
    outputs,
    refuse_unknown,
    trunk,
)

LAYOUT = LAYOUTS["deepvit"]
# ``group`` and the entries of ``depth`` are read by nothing in the original.
READ = (*TRUNK, "num_classes", "apply_transform", "re_atten", "transform_scale", "scale_adjustment", "group")


def student_of(case: Case) -> Classifier:
    """Our classifier with the case's weights, in their type.

    scale_adjustment r multiplies a block's input before each norm and divides each branch by r. A norm of r x is the
    norm of x with its epsilon over r^2, and the division is a LayerScale of 1/r.
    """
    config = case.config
    depth = config["depth"] if isinstance(config["depth"], int) else len(config["depth"])
    reattends = config.get("re_atten", True)
    adjust = config.get("scale_adjustment", 1.0) if reattends else 1.0
    transformed = [number for number, on in enumerate(config.get("apply_transform") or []) if on and reattends]
    options: dict[str, Any] = {"attention": "reattention", "attention_blocks": transformed} if transformed else {}
    if adjust != 1.0:
        options["layer_scale"] = 1 / adjust
    model = trunk(config | {"depth": depth, "qkv_bias": config.get("qkv_bias", False)}, **options)
    model.norm_eps /= adjust**2
    encoder = ViT(model, image_size(config))
    encoder.norm = nn.LayerNorm(encoder.width, eps=epsilon(config.get("norm_layer", "LayerNorm eps=1e-6")))
    for module in encoder.modules():
        if isinstance(module, ReAttention) and config.get("transform_scale", False):
            module.scale = (encoder.width // encoder.size.heads) ** -0.5
    student = Classifier(encoder, Task(pool="class"), config["num_classes"]).to(case.state["head.weight"].dtype)
    missing, unexpected = student.load_state_dict(LAYOUT.take(case.state), strict=False)
    if unexpected or any(".ls" not in name for name in missing):
        raise ValueError(f"names without a place: {unexpected}; without a value: {missing}")
    return student


def whole(case: Case) -> list[Check]:
    """Features, scores and loss in evaluation and in training, gradients, statistics after one step."""
    refuse_unknown(case.config, READ)
    labels = case.inputs["labels"]
    with torch.no_grad():
        actual = student_of(case).eval()({"image": case.inputs["images"], "task": "predict"})
        actual["loss"] = F.cross_entropy(actual["logits"], labels)
    return outputs(case, actual | training(in_double(case)))


def training(case: Case) -> dict[str, torch.Tensor]:
    """Features, scores, loss and gradients in training, statistics after it."""
    student = student_of(case).train()
    predicted = student({"image": case.inputs["images"], "task": "predict"})
    loss = F.cross_entropy(predicted["logits"], case.inputs["labels"])
    loss.backward()
    found = {f"train_{name}": value for name, value in predicted.items()} | {"train_loss": loss}
    after = LAYOUT.give(student.state_dict())
    found |= {f"after_one_train_step/{name}": value for name, value in after.items()}
    return found | gradients(student, LAYOUT)


FAMILIES = (Family("deepvit", "zhoudaquan/dvit_repo", "deep_vision_transformer.py", whole),)
