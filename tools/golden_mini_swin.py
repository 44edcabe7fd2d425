"""Mini-Swin's cases: a multiplexed student, its Swin teacher, and all of MiniViT's losses between them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfseen.classification import Classifier, Task
from halfseen.layouts import LAYOUTS
from halfseen.models.swin import Swin, SwinConfig
from halfseen.models.vit import Trace
from halfseen.pretrain.distill.config import Distillation
from halfseen.pretrain.distill.student import Distilled

from .golden import Case, Check, Family, epsilon, gradients, image_size, outputs, refuse_unknown

LAYOUT = LAYOUTS["mini_swin"]
TASK = Task(pool="norm_mean")
COMMON = ("img_size", "patch_size", "window_size", "mlp_ratio", "qkv_bias", "norm_layer", "in_chans")
SWIN = ("embed_dim", "depths", "num_heads", "ape", "patch_norm")
MINI = ("separate_layer_num_list", "is_sep_layernorm", "is_transform_FFN", "is_transform_heads", "is_student")
LOSSES = ("Ar", "alpha", "temperature", "hidden_weight", "qkv_weight", "student_layer_list", "teacher_layer_list")


def mini_swin(case: Case) -> list[Check]:
    """Both networks' scores, recorded blocks, every loss, and the gradients of both sums."""
    config = case.config
    refuse_unknown(config, ("num_classes", "common", "student", "teacher", *LOSSES))
    teacher = Classifier(swin_of(config, "teacher"), TASK, config["num_classes"]).eval()
    teacher.load_state_dict(LAYOUTS["swin"].take(case.teacher))
    blocks = sorted(config["teacher_layer_list"])
    with torch.no_grad():
        seen = teacher.encoder.trace(case.inputs["images"], layers=blocks, qkv=blocks)
        scores = teacher.scores(seen.tokens)
    batch = {
        "image": case.inputs["images"],
        "target": case.inputs["soft_labels"],
        "teacher_logits": scores,
        "teacher_qkv": [seen.qkv[block] for block in blocks],
        "teacher_hidden": [seen.layers[block] for block in blocks],
    }
    actual = {"teacher_logits": scores} | recorded("teacher", seen, blocks, case.outputs)
    actual |= student_side(case, batch, "code", "grad")
    if "loss_with_mse" in case.outputs:
        found = student_side(case, batch, "match", "grad_mse")
        found["loss_with_mse"] = found.pop("loss")
        actual |= found
    return outputs(case, actual)


def student_side(case: Case, batch: dict[str, Any], form: Any, grad: str) -> dict[str, Tensor]:
    """The student's answers and losses with one form of the loss on hidden states, under the case's names."""
    config, blocks = case.config, sorted(case.config["student_layer_list"])
    cfg = Distillation(
        scores="soft_ce",
        share=1.0 - config["alpha"],
        temperature=config["temperature"],
        student_layers=blocks,
        teacher_layers=sorted(config["teacher_layer_list"]),
        attention=config["qkv_weight"],
        relation_heads=config["Ar"],
        hidden=config["hidden_weight"],
        hidden_form=form,
    )
    widths = [state.shape[-1] for state in batch["teacher_hidden"]]
    student = Distilled(swin_of(config, "student"), TASK, config["num_classes"], cfg, widths)
    weights = LAYOUT.take(case.state)
    # The original has a projection for every stage, whether a block of it is compared or not.
    used = student.state_dict()
    student.load_state_dict({name: value for name, value in weights.items() if name in used or "fits." not in name})
    with torch.no_grad():
        trace = student.encoder.trace(batch["image"], layers=blocks, qkv=blocks)
        found = {"logits": student.scores(trace.tokens)} | recorded("student", trace, blocks, case.outputs)
        if form == "match":
            projected = [student.fits[fit](trace.layers[block]) for fit, block in zip(student.fit_of, blocks)]
            found |= {f"student_hidden_projected{number}": value for number, value in enumerate(projected)}
    terms = student(batch)
    terms["loss"].backward()
    hidden = "loss_hidden_relation" if form == "code" else "loss_hidden_mse"
    ours = {
        "loss_truth": "loss_labels",
        "loss_soft": "loss_scores",
        "loss_attn": "loss_attention",
        hidden: "loss_hidden",
    }
    found |= {name: terms.get(term, torch.zeros(())) for name, term in ours.items()}  # a term of weight 0 is left out
    found["loss"] = terms["loss"]
    for name, value in gradients(student, LAYOUT).items():
        found[grad + official(name, config).removeprefix("grad")] = value
    return found


def official(name: str, config: Mapping[str, Any]) -> str:
    """The name of a gradient; norms that all repetitions share are in no list there."""
    if config["student"].get("is_sep_layernorm", False):
        return name
    return name.replace("norm1_list.0.", "norm1.").replace("norm2_list.0.", "norm2.")


def recorded(side: str, trace: Trace, blocks: list[int], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the case stored of each block: q, k and v, possibly of the first windows only, and the tokens it left."""
    found = {}
    for number, block in enumerate(blocks):
        qkv = torch.stack(trace.qkv[block].chunk(3, dim=-1))
        stored = expected.get(f"{side}_qkv{number}", qkv)
        found[f"{side}_qkv{number}"] = qkv[:, : stored.shape[1]]
        found[f"{side}_hidden{number}"] = trace.layers[block]
    return found


def swin_of(config: Mapping[str, Any], side: str) -> Any:
    """Our Swin trunk for the original's arguments, with the quirks of the released code."""
    own = {**config["common"], **config[side]}
    fit = ("fit_size_C",) if own.get("is_student") else ()  # the widths of the projections, which the teacher tells
    refuse_unknown(own, (*COMMON, *SWIN, *MINI, *fit))
    depths = list(own["depths"])
    distinct = own.get("separate_layer_num_list", depths)
    cfg = SwinConfig(
        width=own["embed_dim"],
        depths=depths,
        heads=list(own["num_heads"]),
        patch=own.get("patch_size", 4),
        window=own.get("window_size", 7),
        mlp_ratio=own.get("mlp_ratio", 4.0),
        qkv_bias=own.get("qkv_bias", True),
        norm_eps=epsilon(own.get("norm_layer", "LayerNorm eps=1e-5")),
        share=[depth // count for depth, count in zip(depths, distinct)],
        own_norms=own.get("is_sep_layernorm", False) if side == "student" else True,
        mix_heads=own.get("is_transform_heads", False),
        local_conv=own.get("is_transform_FFN", False),
        mask_unshifted=side == "student",
        conv_on_norm=True,
        patch_norm=own.get("patch_norm", True),
        absolute=own.get("ape", False),
    )
    height, width = image_size(own)
    if height != width:
        raise ValueError(f"img_size={own['img_size']}: only square images")
    return Swin(cfg, height)


FAMILIES = (Family("mini_swin", "microsoft/Cream", "swin_transformer_minivit_distill.py", mini_swin),)
