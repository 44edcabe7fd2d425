"""DeiT III's cases: the hMLP stem alone, and the ViT with LayerScale, parallel blocks or that stem."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from halfseen.classification import Task
from halfseen.classification.classifier import Classifier
from halfseen.classification.mixing import soft_targets
from halfseen.config import Model
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.models.stem import HMLPStem
from halfseen.selection import freeze

from .golden import (
    TRUNK,
    Case,
    Check,
    Family,
    exact,
    gradients,
    image_size,
    in_double,
    load,
    names,
    number_in,
    outputs,
    refuse_unknown,
    trunk,
)

REPO = "facebookresearch/deit"
# The original's block classes: branches, and whether there is LayerScale.
BLOCKS = {
    "Block": (1, False),
    "Layer_scale_init_Block": (1, True),
    "Block_paralx2": (2, False),
    "Layer_scale_init_Block_paralx2": (2, True),
}
STEMS = {"patch": "patch", "hMLP": "hmlp"}


def stem(case: Case) -> list[Check]:
    """The stem alone: evaluation, training, statistics after one step, gradients, independence of patches."""
    config = case.config
    refuse_unknown(config, ("embed_dim", "img_size", "patch_size", "norm"))
    actual: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        actual["eval_before"] = stem_of(case).encoder.patch_embed.eval()(case.inputs["images"])
    case = in_double(case)
    student = stem_of(case)
    module = student.encoder.patch_embed
    image, later = case.inputs["images"], case.inputs["images2"]
    actual["train"] = module(image)
    actual["loss"] = (actual["train"] * case.inputs["loss_weight"]).sum()
    actual["loss"].backward()
    statistics = {f"after_one_train_step/{name}": value for name, value in module.named_buffers()}
    row, column = changed_patch(case)
    side, grid_width = config["patch_size"], image_size(config)[1] // config["patch_size"]
    changed = later.clone()
    changed[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 1.0
    with torch.no_grad():
        module.eval()
        actual["eval_after"] = module(later)
        actual["eval_after_changed_patch"] = module(changed)
    moved = (actual["eval_after"] != actual["eval_after_changed_patch"]).any(-1)
    alone = torch.zeros_like(moved)
    alone[:, row * grid_width + column] = True
    found = outputs(case, actual | statistics | gradients(student, LAYOUTS["deit_stem"]))
    return [*found, exact("tokens that one changed patch changes", moved, alone)]


def stem_of(case: Case) -> Any:
    """A student that is its trunk's stem alone, with the case's weights, in their type."""
    config = case.config
    student: Any = torch.nn.Module()
    student.encoder = torch.nn.Module()
    student.encoder.patch_embed = HMLPStem(config["embed_dim"], config["patch_size"], *norm_of(config["norm"]))
    student.to(case.inputs["images"].dtype)
    load(student, case, LAYOUTS["deit_stem"])
    return student


def norm_of(text: str) -> tuple[str, float]:
    """Our stem's norm for the original's, e.g. ``BatchNorm2d eps=1e-5 momentum=0.1``."""
    kind, *options = text.split()
    settings = dict(option.split("=") for option in options)
    if kind == "LayerNorm":
        return "layer", float(settings["eps"])
    if kind != "BatchNorm2d" or float(settings["eps"]) != 1e-5 or float(settings["momentum"]) != 0.1:
        raise ValueError(f"norm={text!r} is no LayerNorm and no BatchNorm2d with eps 1e-5, momentum 0.1")
    return "batch", 1e-5


def changed_patch(case: Case) -> tuple[int, int]:
    """Row and column of the patch that the case's words say was changed."""
    text = case.meta["meaning"]["out/eval_after_changed_patch"]
    found = re.search(r"(?<![0-9.])1\.0 added .*row (\d+), column (\d+)", text)
    if not found:
        raise ValueError(f"cannot tell which patch was changed from {text!r}")
    return int(found[1]), int(found[2])


def whole(case: Case) -> list[Check]:
    """Features, scores and loss in evaluation and in training, and gradients of the training loss."""
    config = case.config
    refuse_unknown(config, (*TRUNK, "num_classes", "block", "stem"))
    smoothing = number_in(" ".join(case.meta["meaning"].values()), r"smoothing ([0-9.]+)")
    target = soft_targets(case.inputs["labels"], config["num_classes"], smoothing)
    actual: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        student, image = student_of(case).eval(), case.inputs["images"]
        actual |= student({"image": image, "task": "predict"})
        actual["loss"] = student({"image": image, "target": target})["loss"]
    case = in_double(case)
    student, image, target = student_of(case), case.inputs["images"], target.double()
    with torch.no_grad():
        predicted = student({"image": image, "task": "predict"})
        actual |= {f"train_{name}": value for name, value in predicted.items()}
    actual["train_loss"] = student({"image": image, "target": target})["loss"]
    actual["train_loss"].backward()
    found = outputs(case, actual | gradients(student, LAYOUTS["deit"]))
    if "attn_only_trainable" in case.meta:
        chosen = freeze(student, "attention", strict_official=True).trained
        found.append(names("attn_only_trainable", LAYOUTS["deit"].give(chosen), case.meta["attn_only_trainable"]))
    return found


def model_of(config: Mapping[str, Any]) -> Model:
    """Our Model for the arguments of models_v2's class."""
    branches, scaled = BLOCKS[config.get("block", "Block")]
    return trunk(
        config,
        position_on_class=False,
        parallel=branches,
        layer_scale=1e-4 if scaled else None,
        stem=STEMS[config.get("stem", "patch")],
        stem_norm="batch",
    )


def student_of(case: Case) -> Classifier:
    """Our classifier with the case's weights, in their type."""
    config = case.config
    student = Classifier(ViT(model_of(config), image_size(config)), Task(pool="class"), config["num_classes"])
    student.to(case.inputs["images"].dtype)
    load(student, case, LAYOUTS["deit"])
    return student


FAMILIES = (
    Family("deit_hmlp_stem", REPO, "models_v2.py", stem),
    Family("deit_v2", REPO, "models_v2.py", whole),
)
