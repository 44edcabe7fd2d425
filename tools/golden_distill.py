"""Distillation's cases: MiniViT's losses on given tensors, and DeiT's student with two heads."""

from typing import Any

import torch

from halfseen.classification import Task
from halfseen.classification.mixing import soft_targets
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.pretrain.distill import losses
from halfseen.pretrain.distill.config import Distillation
from halfseen.pretrain.distill.student import Distilled

from .golden import TRUNK, Case, Check, Family, gradients, image_size, load, number_in, outputs, refuse_unknown, trunk

SIZES = ("B", "N", "C_student", "C_teacher", "layers")  # of the inputs; the tensors say the same


def minivit(case: Case) -> list[Check]:
    """Scores, attention relations and hidden relations, and the gradients of their sum."""
    config, given = case.config, case.inputs
    refuse_unknown(config, (*SIZES, "Ar"))
    layers = range(config["layers"])
    logits = given["logits"].requires_grad_()
    parts = [[part.clone().requires_grad_() for part in given["student_qkv"][layer]] for layer in layers]
    states = [given["student_hidden"][layer].clone().requires_grad_() for layer in layers]
    theirs = [torch.cat(list(given["teacher_qkv"][layer]), dim=-1) for layer in layers]
    relations = [losses.attention_relation(torch.cat(parts[n], -1), theirs[n], config["Ar"]) for n in layers]
    hidden = [losses.hidden_relation_code(states[n], given["teacher_hidden"][n]) for n in layers]
    actual = {
        "soft_cross_entropy": losses.soft_cross_entropy(logits, given["teacher_logits"]),
        "relation": losses.over_layers(relations),
        "hidden_relation": losses.over_layers(hidden),
    }
    if "hidden_mse" in case.outputs:  # without a projection, so only for equal widths
        matched = [losses.matching(states[n], given["teacher_hidden"][n]) for n in layers]
        actual["hidden_mse"] = losses.over_layers(matched)
    (actual["soft_cross_entropy"] + actual["relation"] + actual["hidden_relation"]).backward()
    actual["grad/logits"] = gradient(logits)
    for layer in layers:
        actual[f"grad/student_hidden{layer}"] = gradient(states[layer])
        actual |= {f"grad/student_{name}{layer}": gradient(part) for name, part in zip("qkv", parts[layer])}
    return outputs(case, actual)


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient a tensor has received."""
    assert tensor.grad is not None, "every input takes part in the loss"
    return tensor.grad


def deit(case: Case) -> list[Check]:
    """Both heads in training and their mean in evaluation; every loss; gradients of soft and hard distillation."""
    config, given = case.config, case.inputs
    refuse_unknown(config, (*TRUNK, "num_classes", "alpha", "tau"))
    layout, model = LAYOUTS["timm"], trunk(config, distillation_token=True)

    def student(kind: Any) -> Distilled:
        cfg = Distillation(scores=kind, share=config["alpha"], temperature=config["tau"])
        made = Distilled(ViT(model, image_size(config)), Task(pool="class"), config["num_classes"], cfg)
        load(made, case, layout)
        return made

    smoothing = number_in(case.meta["meaning"]["out/loss_<distill kind>_<base criterion>"], r"smoothing ([0-9.]+)")
    targets = targets_of(case, smoothing)
    image = given["images"]
    plain = student("none").eval()
    with torch.no_grad():
        tokens = plain.encoder(image)
        actual = {
            "logits_eval": plain({"image": image, "task": "predict"})["logits"],
            "logits_cls": plain.head(tokens[:, 0]),
            "logits_dist": plain.head_dist(tokens[:, 1]),
        }
    for name in case.outputs:
        if name.startswith("loss_"):
            _, kind, base = name.split("_")
            made = student(kind)
            actual[name] = made(targets[base] | {"image": image, "teacher_logits": given["teacher_logits"]})["loss"]
            if base == "softlabels":
                actual[name].backward()
                actual |= {f"grad_{kind}/{key[5:]}": value for key, value in gradients(made, layout).items()}
    return outputs(case, actual)


def targets_of(case: Case, smoothing: float) -> dict[str, dict[str, Any]]:
    """What the base criterion compares with: given soft labels, smoothed labels, plain labels."""
    labels, classes = case.inputs["labels"], case.config["num_classes"]
    return {
        "softlabels": {"target": case.inputs["soft_labels"]},
        "smooth": {"target": soft_targets(labels, classes, smoothing)},
        "hardlabels": {"target": soft_targets(labels, classes, 0.0)},
    }


FAMILIES = (
    Family("minivit_losses", "microsoft/Cream", "Mini-Swin/main.py", minivit),
    Family("deit_distilled", "facebookresearch/deit", "models.py, losses.py", deit),
)
