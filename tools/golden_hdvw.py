"""How do vision transformers work: attention over maps, AlterNet's attention block, the repository's ConViT."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.classification import Task
from halfseen.classification.classifier import Classifier
from halfseen.config import Model
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.models.alternet import AttentionBlock, PostAttentionBlock
from halfseen.models.convolutional import Attention2d, ConvAttention2d, LocalAttention

from .golden import Case, Check, Family, gradients, image_size, in_double, load, outputs, refuse_unknown

REPO = "xxxnell/how-do-vits-work"
SHAPE = ("cls", "dim_in", "dim_out", "heads", "dim_head")
# AlterNet's blocks of attention: ours, and the expansion.
BLOCKS: dict[str, tuple[type[AttentionBlock | PostAttentionBlock], int]] = {
    "AttentionBlockA": (PostAttentionBlock, 4),
    "AttentionBasicBlockA": (PostAttentionBlock, 1),
    "AttentionBlockB": (AttentionBlock, 4),
    "AttentionBasicBlockB": (AttentionBlock, 1),
}
WINDOW = ("kernel_size", "padding", "dilation", "stride", "k")


def kernel_of(config: dict[str, Any]) -> dict[str, Any]:
    """Our options for the original's unfolding, which works only where windows and queries are equally many."""
    kernel, dilation = config.get("kernel_size", 1), config.get("dilation", 1)
    same = dilation * (kernel - 1) // 2
    if config.get("padding", 0) != same or config.get("stride", 1) != 1 or config.get("k", 1) != 1:
        raise ValueError(f"padding {same}, stride 1 and k 1 are what the original runs with, not {config}")
    return {"kernel": kernel, "dilation": dilation, "padding": "zero"}


def shape_of(config: dict[str, Any], heads: int, head_width: int) -> tuple[int, int, int, int | None]:
    """Width, heads, width of a head and width of the result; the defaults are the original class's."""
    return config["dim_in"], config.get("heads", heads), config.get("dim_head", head_width), config.get("dim_out")


def attention2d(config: dict[str, Any]) -> nn.Module:
    """Global attention with strided keys."""
    refuse_unknown(config, (*SHAPE, "k"))
    return Attention2d(*shape_of(config, 8, 64), stride=config.get("k", 1))


def conv_attention2d(config: dict[str, Any]) -> nn.Module:
    """Attention to a neighbourhood."""
    refuse_unknown(config, (*SHAPE, *WINDOW))
    return ConvAttention2d(*shape_of(config, 8, 64), **kernel_of(config))


def local_attention(config: dict[str, Any]) -> nn.Module:
    """Attention within windows."""
    refuse_unknown(config, (*SHAPE, "window_size", "k"))
    if config.get("k", 1) != 1:
        raise ValueError("within windows the original runs with k=1 alone: its bias has one number per pair of places")
    return LocalAttention(*shape_of(config, 8, 32), window=config.get("window_size", 7))


def module(make: Callable[[dict[str, Any]], nn.Module]) -> Callable[[Case], list[Check]]:
    """The check of one attention module: result, weights, gradients."""

    def run(case: Case) -> list[Check]:
        student = make(case.config)
        load(student, case, LAYOUTS["hdvw"])
        x = case.inputs["x"].requires_grad_()
        out, weights = student(x.permute(0, 2, 3, 1), case.inputs.get("mask"))
        out = out.permute(0, 3, 1, 2)
        loss = (out * case.inputs["loss_weight"]).sum()
        loss.backward()
        actual = {"output": out, "attention": weights, "loss": loss}
        if x.grad is not None:
            actual["grad/input"] = x.grad
        return outputs(case, actual | gradients(student, LAYOUTS["hdvw"]))

    return run


def block(case: Case) -> list[Check]:
    """AlterNet's attention blocks in evaluation and in training; statistics after one step."""
    config = case.config
    refuse_unknown(config, (*SHAPE, "window_size", "k", "stride", "sd", "dropout"))
    if config["cls"] not in BLOCKS:
        raise ValueError(f"cls={config['cls']!r} is none of {sorted(BLOCKS)}")
    if config.get("stride", 1) != 1 or config.get("k", 1) != 1 or config.get("sd", 0.0) or config.get("dropout", 0.0):
        raise ValueError("the block works with stride 1 and k 1, and this case has no randomness")
    with torch.no_grad():
        out = attention_block(case).eval()(case.inputs["x"].permute(0, 2, 3, 1))
    actual = {"output_eval": out.permute(0, 3, 1, 2)} | training(in_double(case))
    return outputs(case, actual)


def training(case: Case) -> dict[str, Tensor]:
    """Result, loss and gradients of the block in training, statistics after it."""
    student, x = attention_block(case).train(), case.inputs["x"].requires_grad_()
    out = student(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    loss = (out * case.inputs["loss_weight"]).sum()
    loss.backward()
    found = {"output_train": out, "loss": loss} | gradients(student, LAYOUTS["hdvw"])
    after = LAYOUTS["hdvw"].give(student.state_dict())
    found |= {f"after_one_train_step/{name}": value for name, value in after.items()}
    return found if x.grad is None else found | {"grad/input": x.grad}


def attention_block(case: Case) -> AttentionBlock | PostAttentionBlock:
    """AlterNet's block with the case's weights, in their type."""
    config = case.config
    kind, expansion = BLOCKS[config["cls"]]
    student = kind(
        config["dim_in"],
        config.get("dim_out") or config["dim_in"],
        config.get("heads", 8),
        config.get("dim_head", 64),
        config.get("window_size", 7),
        expansion,
    )
    student.to(case.inputs["x"].dtype)
    load(student, case, LAYOUTS["hdvw"])
    return student


def convit(case: Case) -> list[Check]:
    """The repository's ConViT: what enters and leaves the blocks, scores, gradients."""
    config = case.config
    own = ("image_size", "patch_size", "num_classes", "depth", "dim", "heads", "dim_mlp", "channel", "dim_head")
    refuse_unknown(config, (*own, *WINDOW, "emb_dropout", "sd"))  # what is stored was not drawn
    if config.get("channel", 3) != 3:
        raise ValueError(f"channel={config['channel']}: only RGB")
    window = kernel_of({"kernel_size": 3} | config)
    model = Model(
        width=config["dim"],
        depth=config["depth"],
        heads=config["heads"],
        head_width=config.get("dim_head", 64),
        patch=config["patch_size"],
        mlp_ratio=config["dim_mlp"] / config["dim"],
        class_token=False,
        attention="convolutional",
        attention_kernel=window["kernel"],
        attention_dilation=window["dilation"],
        attention_padding=window["padding"],
        norm_eps=1e-5,
    )
    encoder = ViT(model, image_size({"img_size": config["image_size"]}))
    student = Classifier(encoder, Task(), config["num_classes"])
    load(student, case, LAYOUTS["hdvw_convit"])
    image = case.inputs["images"]
    with torch.no_grad():
        embedded = encoder.embed(image)
    tokens = encoder(image)
    logits = student.scores(tokens)
    loss = (logits * case.inputs["loss_weight"]).sum()
    loss.backward()
    actual = {"logits": logits, "loss": loss}
    for name, value in (("embedded", embedded), ("trunk", tokens)):
        actual[name] = value.transpose(1, 2).unflatten(2, encoder.grid)
    return outputs(case, actual | gradients(student, LAYOUTS["hdvw_convit"]))


FAMILIES = (
    Family("hdvw_attention2d", REPO, "attentions.py", module(attention2d)),
    Family("hdvw_convattention2d", REPO, "convit.py", module(conv_attention2d)),
    Family("hdvw_localattention", REPO, "alternet.py", module(local_attention)),
    Family("hdvw_alternet_block", REPO, "alternet.py", block),
    Family("hdvw_convit", REPO, "convit.py", convit),
)
