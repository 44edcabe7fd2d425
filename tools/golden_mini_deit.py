"""Mini-DeiT's cases: shared blocks with maps over heads and iRPE, distilled on their single output."""

from typing import Any

import torch

from halfseen.classification import Task
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.pretrain.distill.config import Distillation
from halfseen.pretrain.distill.student import Distilled

from .golden import TRUNK, Case, Check, Family, gradients, image_size, load, outputs, refuse_unknown, trunk
from .golden_distill import targets_of

LAYOUT = LAYOUTS["mini_deit"]
PARTS = ("use_cls_token", "repeated_times", "use_transform", "rpe_config", "num_classes", "alpha", "tau")
RPE = ("ratio", "method", "mode", "shared_head", "skip", "rpe_on")


def mini_deit(case: Case) -> list[Check]:
    """Features, scores, the three losses, and gradients of the soft one."""
    config, given = case.config, case.inputs
    refuse_unknown(config, (*TRUNK, *PARTS))
    model = trunk(
        config,
        class_token=config.get("use_cls_token", True),
        share=config.get("repeated_times", 1),
        head_mixing="linear" if config.get("use_transform", False) else "none",
        **irpe_options(config),
    )
    pool: Any = "class" if model.class_token else "norm_mean"

    def student(kind: Any) -> Distilled:
        cfg = Distillation(scores=kind, share=config["alpha"], temperature=config["tau"])
        made = Distilled(ViT(model, image_size(config)), Task(pool=pool), config["num_classes"], cfg)
        load(made, case, LAYOUT)
        return made

    image, targets = given["images"], targets_of(case, 0.0)
    made = student("soft")
    with torch.no_grad():
        tokens = made.encoder(image)
        actual = {"features": tokens[:, 0] if model.class_token else tokens, "logits": made.scores(tokens)}
    batch = {"image": image, "teacher_logits": given["teacher_logits"]}
    actual["loss_soft_hardlabels"] = made(batch | targets["hardlabels"])["loss"]
    actual["loss_hard"] = student("hard")(batch | targets["softlabels"])["loss"]
    actual["loss_soft"] = made(batch | targets["softlabels"])["loss"]
    actual["loss_soft"].backward()
    return outputs(case, actual | gradients(made, LAYOUT))


def irpe_options(config: dict[str, Any]) -> dict[str, Any]:
    """Our model's options for the original's rpe_config."""
    rpe = config.get("rpe_config")
    if not rpe:
        return {}
    refuse_unknown(rpe, RPE)
    if bool(rpe.get("skip", 0)) != bool(config.get("use_cls_token", True)):
        raise ValueError(f"rpe_config skips {rpe.get('skip')} tokens, which are not those of the trunk")
    modes = {"ctx": "contextual", "contextual": "contextual", "bias": "bias"}
    methods = {"euc": "euclidean"}
    return {
        "irpe": methods.get(rpe["method"], rpe["method"]),
        "irpe_mode": modes[rpe["mode"]],
        "irpe_on": rpe["rpe_on"],
        "irpe_shared": rpe["shared_head"],
        "irpe_ratio": rpe["ratio"],
    }


FAMILIES = (Family("mini_deit", "microsoft/Cream", "Mini-DeiT/mini_vision_transformer.py", mini_deit),)
