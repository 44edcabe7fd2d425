"""BEiT's and BEiT v2's pretraining students, from official weights: features, logits, losses, gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfseen.config import Model
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.models.relative import RelativeBias
from halfseen.pretrain.beit2 import BEiT2, BEiT2Config
from halfseen.pretrain.mim import MIM, MIMConfig
from halfseen.pretrain.targets.codes import cross_entropy

from .golden import TRUNK, Case, Check, Family, gradients, image_size, load, outputs, refuse_unknown, trunk

UNILM = "microsoft/unilm"
BEIT = (
    *TRUNK,
    *("vocab_size", "init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
)


class CodeLoss:
    """As much of a code target as a student needs when the codes are given."""

    def __init__(self, count: int) -> None:
        self.width = count

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """See pretrain/targets/codes.py."""
        return cross_entropy(prediction, target, weight)


def beit_model(config: Mapping[str, Any]) -> Model:
    """Our Model for the arguments of BEiT's classes. LayerScale is where init_values is above 0, as there."""
    relative = "shared" if config.get("use_shared_rel_pos_bias", False) else "none"
    return trunk(
        config,
        position="learned" if config.get("use_abs_pos_emb", True) else "none",
        relative="block" if config.get("use_rel_pos_bias", False) else relative,
        key_bias=False,
        layer_scale=config["init_values"] if (config.get("init_values") or 0) > 0 else None,
    )


def beit_trunk(config: Mapping[str, Any]) -> ViT:
    """Our trunk for the arguments of BEiT's classes. They allow a table of all blocks beside each one's own."""
    encoder = ViT(beit_model(config), image_size(config))
    if config.get("use_rel_pos_bias") and config.get("use_shared_rel_pos_bias"):
        encoder.rel_pos_bias = RelativeBias(encoder.size.heads, encoder.grid, encoder.prefix)
    return encoder


def pretrain(case: Case) -> list[Check]:
    """BEiT: logits of all and of hidden patches, loss, accuracy, gradients."""
    config = case.config
    refuse_unknown(config, BEIT)
    encoder = beit_trunk(config)
    mask = case.inputs["mask"].flatten(1).bool()
    hidden = int(mask.sum(1).max())
    target: Any = CodeLoss(config["vocab_size"])
    student = MIM(encoder, MIMConfig(mean="patch"), hidden, target)
    load(student, case, LAYOUTS["beit"])
    batch = {"image": case.inputs["images"], "mask": mask, "target": case.inputs["token_ids"]}
    with torch.no_grad():
        predicted = student(batch | {"task": "predict"})
    scalars = student(batch)
    scalars["loss"].backward()
    actual = {
        "features": predicted["latent"],
        "logits_all": predicted["prediction"],
        "logits_masked": predicted["prediction"][mask],
        "loss": scalars["loss"],
        "masked_accuracy": scalars["accuracy"],
    }
    return outputs(case, actual | gradients(student, LAYOUTS["beit"]))


def aggregate(case: Case) -> list[Check]:
    """BEiT v2: both branches' features and logits, both losses, gradients of their sum."""
    config = case.config
    own = ("early_layers", "head_layers", "shared_lm_head")
    refuse_unknown(config, (*BEIT, *own))
    encoder = beit_trunk(config)
    mask = case.inputs["mask"].flatten(1).bool()
    cfg = BEiT2Config(
        mean="patch",
        early=config.get("early_layers", 6),
        extra=config.get("head_layers", 2),
        shared_head=config.get("shared_lm_head", True),
    )
    target: Any = CodeLoss(config["vocab_size"])
    student = BEiT2(encoder, cfg, int(mask.sum(1).max()), target)
    load(student, case, LAYOUTS["beit2"])
    image, codes = case.inputs["images"], case.inputs["token_ids"]
    with torch.no_grad():
        main, branch = student.tokens(image, mask)
        heads = (student.head, student.aggregation.head or student.head)
        logits = [head(tokens[:, 1:]) for head, tokens in zip(heads, (main, branch))]
        actual = {
            "features": main,
            "features_cls_branch": branch,
            "logits_all": logits[0],
            "logits_all_cls_branch": logits[1],
            "logits": logits[0][mask],
            "logits_cls_branch": logits[1][mask],
        }
    scalars = student({"image": image, "mask": mask, "target": codes})
    scalars["loss"].backward()
    actual |= {"loss_1": scalars["loss_patch"], "loss_2": scalars["loss_class"], "loss": scalars["loss"]}
    return outputs(case, actual | gradients(student, LAYOUTS["beit2"]))


FAMILIES = (
    Family("beit_mim", UNILM, "beit/modeling_pretrain.py", pretrain),
    Family("beit2_clspt", UNILM, "beit2/modeling_pretrain.py", aggregate),
)
