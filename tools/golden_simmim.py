"""SimMIM's cases: features, reconstruction, loss and gradients of a ViT and of a Swin, from official weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.layouts import LAYOUTS
from halfseen.models.swin import Swin, SwinConfig
from halfseen.pretrain.mim import MIM, MIMConfig
from halfseen.pretrain.patches import unpatchify
from halfseen.pretrain.simmim import SimMIM
from halfseen.pretrain.targets import Pixels

from .golden import TRUNK, Case, Check, Family, epsilon, gradients, image_size, outputs, refuse_unknown
from .golden_beit import beit_trunk

REPO = "microsoft/SimMIM"
LAYOUT = LAYOUTS["simmim"]
OBJECTIVE = ("kind", "encoder_stride", "mask_patch_size", "mask_ratio", "num_classes")
VIT = ("init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_mean_pooling")
SWIN = ("depths", "num_heads", "window_size", "ape", "patch_norm")


def vit(case: Case) -> list[Check]:
    """BEiT's ViT under SimMIM's head."""
    config, state = dict(case.config), case.state
    refuse_unknown(config, (*OBJECTIVE, *TRUNK, *VIT))
    biased = "encoder.blocks.0.attn.q_bias" in state
    if config.get("qkv_bias", biased) != biased:
        raise ValueError(f"qkv_bias={config['qkv_bias']}, and the weights have {'q_bias' if biased else 'none'}")
    scale = 1.0 if "encoder.blocks.0.gamma_1" in state else None  # its value is in the weights
    encoder = beit_trunk(config | {"qkv_bias": biased, "init_values": scale})
    if config.get("use_mean_pooling", True):
        encoder.norm = nn.Identity()  # the original pools and norms in its classifier only
    mask = case.inputs["mask"].flatten(1).bool()
    hidden = int(mask[0].sum())
    student = MIM(encoder, MIMConfig(), hidden, Pixels(encoder.patch, False, "absolute"))
    return compare(case, student, mask, encoder.patch, encoder.patch)


def swin(case: Case) -> list[Check]:
    """Swin under SimMIM's head."""
    config, state = case.config, case.state
    refuse_unknown(config, (*OBJECTIVE, *TRUNK, *SWIN))
    cfg = SwinConfig(
        width=config["embed_dim"],
        depths=list(config["depths"]),
        heads=list(config["num_heads"]),
        patch=config["patch_size"],
        window=config["window_size"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias="encoder.layers.0.blocks.0.attn.qkv.bias" in state,
        norm_eps=epsilon(config.get("norm_layer", "LayerNorm eps=1e-5")),
        patch_norm="encoder.patch_embed.norm.weight" in state,
        absolute="encoder.absolute_pos_embed" in state,
    )
    for key, found in (("qkv_bias", cfg.qkv_bias), ("patch_norm", cfg.patch_norm), ("ape", cfg.absolute)):
        if config.get(key, found) != found:
            raise ValueError(f"{key}={config[key]}, and the weights say {found}")
    (side, _) = image_size(config)
    encoder = Swin(cfg, side)
    # The mask is given on the stem's grid. Units finer than a place of the last stage are taken as they are.
    unit = encoder.stride if config["mask_patch_size"] % encoder.stride == 0 else cfg.patch
    step = unit // cfg.patch
    mask = case.inputs["mask"][:, ::step, ::step].flatten(1).bool()
    student = SimMIM(encoder, MIMConfig(), int(mask[0].sum()), Pixels(unit, False, "absolute"), unit)
    return compare(case, student, mask, unit, encoder.stride)


def compare(case: Case, student: MIM, mask: Tensor, unit: int, stride: int) -> list[Check]:
    """Load, run, go back; every number of the case."""
    given = LAYOUT.take(case.state)
    student.eval().load_state_dict({name: value for name, value in given.items() if "fc_norm" not in name})
    if case.config["encoder_stride"] != stride:
        raise ValueError(f"encoder_stride={case.config['encoder_stride']}, and this trunk's is {stride}")
    image = case.inputs["images"]
    batch: dict[str, Any] = {"image": image, "mask": mask}
    with torch.no_grad():
        predicted = student(batch | {"task": "predict"})
    loss = student(batch | {"target": Pixels(unit, False)(batch)})["loss"]
    loss.backward()
    height, width = (side // unit for side in image.shape[2:])
    tokens = predicted["latent"][:, student.encoder.prefix :]
    actual: Mapping[str, Tensor] = {
        "loss": loss,
        "encoder_map": tokens.transpose(1, 2).unflatten(2, student.encoder.grid),
        "reconstruction": unpatchify(predicted["prediction"], unit, (height, width)),
    }
    return outputs(case, {**actual, **gradients(student, LAYOUT)})


FAMILIES = (
    Family("simmim_vit", REPO, "models/simmim.py", vit),
    Family("simmim_swin", REPO, "models/simmim.py", swin),
)
