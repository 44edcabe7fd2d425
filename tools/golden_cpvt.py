"""CPVT: one positional encoding generator, and the pyramid of CPVT-v2."""

from torch import nn

from halfseen.layouts import LAYOUTS
from halfseen.models.peg import PEG
from halfseen.models.pyramid import Pyramid, PyramidConfig

from .golden import Case, Check, Family, epsilon, gradients, image_size, load, outputs, refuse_unknown

REPO = "Meituan-AutoML/Twins"


def generator(case: Case) -> list[Check]:
    """One PEG on tokens, and its gradients."""
    config = case.config
    refuse_unknown(config, ("in_chans", "embed_dim", "stride", "s", "H", "W"))
    stride = config.get("stride", config.get("s", 1))
    width = config.get("in_chans", config["embed_dim"])
    module = PEG(width, (config["H"], config["W"]), out=config["embed_dim"], stride=stride)
    load(module, case, LAYOUTS["peg"])
    x = case.inputs["x"].requires_grad_()
    out = module(x)
    loss = (out * case.inputs["loss_weight"]).sum()
    loss.backward()
    found = gradients(module, LAYOUTS["peg"])
    inputs = {f"grad/{name}": x.grad for name in ("x", "input") if x.grad is not None}
    return outputs(case, {"output": out, "loss": loss} | found | inputs)


def whole(case: Case) -> list[Check]:
    """Features and scores of the pyramid, and gradients."""
    config = case.config
    listed = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")
    refuse_unknown(config, ("img_size", "patch_size", "in_chans", "num_classes", "qkv_bias", "norm_layer", *listed))
    if config.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans={config['in_chans']}: only RGB")
    widths, heads, ratios, depths, reductions = (list(config[name]) for name in listed)
    height, width = image_size(config)
    if height != width:
        raise ValueError(f"img_size={config['img_size']}: the original divides it as one number")
    cfg = PyramidConfig(
        positions="peg",
        depths=depths,
        widths=widths,
        heads=heads,
        mlp_ratios=ratios,
        reductions=reductions,
        patch=config["patch_size"],
        qkv_bias=config.get("qkv_bias", False),
        norm_eps=epsilon(config.get("norm_layer", "LayerNorm")),
    )
    student = nn.Module()
    student.encoder = Pyramid(cfg, height)
    student.head = nn.Linear(widths[-1], config["num_classes"])
    load(student, case, LAYOUTS["cpvt"])
    features = student.encoder(case.inputs["images"]).mean(1)
    logits = student.head(features)
    loss = (logits * case.inputs["loss_weight"]).sum()
    loss.backward()
    actual = {"features": features, "logits": logits, "loss": loss}
    return outputs(case, actual | gradients(student, LAYOUTS["cpvt"]))


FAMILIES = (
    Family("peg", REPO, "gvt.py", generator),
    Family("cpvt", REPO, "gvt.py", whole),
)
