"""Fine-tuning cases: DeiT's attention-only switch at a higher resolution; BEiT's rates, groups and classifier."""

import re
from typing import Any

import torch

from halfseen import optim
from halfseen.classification import Classifier, Task
from halfseen.classification.mixing import soft_targets
from halfseen.config import Model, Optim
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.weights import initialise

from .golden import (
    TRUNK,
    Case,
    Check,
    Family,
    gradients,
    image_size,
    load,
    names,
    numbers,
    outputs,
    refuse_unknown,
)
from .golden_beit import UNILM, beit_trunk
from .golden_deit import model_of
from .golden_rates import SIZES, compare_groups

DEIT = "facebookresearch/deit"
LAYOUT = LAYOUTS["deit"]


def attention_only(case: Case) -> list[Check]:
    """A checkpoint moved to a larger grid, DeiT's own choice of what trains, scores, loss and gradients."""
    config = case.config
    refuse_unknown(config, (*TRUNK, "src_img", "dst_img", "num_classes", "block", "stem"))
    task = Task(pool="class", train="attention", strict_official=True)
    size = image_size({"img_size": config["dst_img"]})
    student = Classifier(ViT(model_of(config), size), task, config["num_classes"])
    initialise(student, case.state, coverage=1.0)
    target = soft_targets(case.inputs["labels"], config["num_classes"], 0.0)
    student.eval()
    with torch.no_grad():
        actual = student({"image": case.inputs["images"], "task": "predict"})
    actual["loss"] = student({"image": case.inputs["images"], "target": target})["loss"]
    actual["loss"].backward()
    if student.encoder.pos_embed is not None:
        actual["pos_embed"] = student.encoder.pos_embed
    trained = LAYOUT.give(student.selection.trained)
    return [
        *outputs(case, actual | gradients(student, LAYOUT)),
        names("attn_only_trainable", trained, case.meta["attn_only_trainable"]),
    ]


def schedule(case: Case) -> list[Check]:
    """BEiT's table of values, at the iterations the case lists, and their sum over all iterations."""
    checks = []
    for number, table in enumerate(case.meta["data"]):
        args: dict[str, Any] = {"warmup_epochs": 0, "warmup_steps": -1, "start_warmup_value": 0} | table["args"]
        known = ("base_value", "final_value", "epochs", "niter_per_ep", "start_warmup_value")
        refuse_unknown(args, (*known, "warmup_epochs", "warmup_steps"))
        warmup = args["warmup_epochs"] * args["niter_per_ep"]
        if args["warmup_steps"] > 0:
            warmup = args["warmup_steps"]
        batch, total = 32, args["epochs"] * args["niter_per_ep"]  # any batch will do: the table counts iterations
        cfg = Optim(
            base_lr=None,
            lr=args["base_value"],
            min_lr=args["final_value"],
            warmup_lr=args["start_warmup_value"],
            schedule="beit",
        )
        ours = optim.Schedule(cfg, args["base_value"], warmup * batch, total * batch, batch)
        values = [ours.rate(step * batch) for step in range(total)]
        steps, expected = zip(*table["at"])
        checks.append(numbers(f"data/{number}", [values[int(step)] for step in steps], expected, atol=1e-18))
        checks.append(numbers(f"data/{number}/length", [len(values)], [table["length"]]))
        checks.append(numbers(f"data/{number}/sum", [sum(values)], [table["sum"]]))
    return checks


def layer_decay(case: Case) -> list[Check]:
    """Rate scale and weight decay of every parameter of BEiT's fine-tuning model."""
    config, data = case.config, case.meta["data"]
    refuse_unknown(config, ("model", "layer_decay", "weight_decay", "rel_pos_bias_exempt_from_decay"))
    student = beit(config["model"])
    cfg = Optim(weight_decay=config["weight_decay"], layer_decay=config["layer_decay"])
    exempt = {"cls_token", "pos_embed"}
    if config.get("rel_pos_bias_exempt_from_decay"):
        exempt.add("relative_position_bias_table")
    groups = optim.groups(student, cfg, student.layer_of, student.layers(), exempt)
    return compare_groups("layer_decay", groups, data, LAYOUTS["beit"])


def beit(text: str) -> Classifier:
    """The model a case names, e.g. ``beit_base_patch16_224, rel pos bias, no abs pos``, without memory for it."""
    found = re.match(r"beit_([a-z]+)_patch(\d+)_(\d+)", text)
    if not found or found[1] not in SIZES:
        raise ValueError(f"model {text!r} is not a BEiT of a known size")
    relative = "none" if "no rel pos" in text else "shared" if "shared rel pos" in text else "block"
    model = Model(
        size=SIZES[found[1]],
        patch=int(found[2]),
        position="none" if "no abs pos" in text or "abs pos" not in text else "learned",
        relative=relative if "rel pos" in text else "none",  # type: ignore[arg-type]
        key_bias=False,
        layer_scale=0.1,
    )
    with torch.device("meta"):
        return Classifier(ViT(model, int(found[3])), Task(pool="mean"), 1000)


BEIT_MODEL = (
    *("num_classes", "init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
    "use_mean_pooling",
)


def classify(case: Case) -> list[Check]:
    """BEiT's fine-tuning model: tokens after each block, features, scores, loss and gradients."""
    config, layout = case.config, LAYOUTS["beit"]
    refuse_unknown(config, (*TRUNK, *BEIT_MODEL))
    task = Task(pool="mean" if config.get("use_mean_pooling", True) else "class")
    student = Classifier(beit_trunk(config), task, config["num_classes"]).eval()
    load(student, case, layout)
    image = case.inputs["images"]
    with torch.no_grad():
        actual = student({"image": image, "task": "predict"})
        layers = student.encoder.trace(image, layers=range(config["depth"])).layers
    actual |= {f"block{number}": tokens for number, tokens in layers.items()}
    actual["loss"] = student({"image": image, "target": case.inputs["soft_labels"]})["loss"]
    actual["loss"].backward()
    return outputs(case, actual | gradients(student, layout))


FAMILIES = (
    Family("beit_finetune", UNILM, "beit/modeling_finetune.py", classify),
    Family("deit_attn_only_highres", DEIT, "main.py", attention_only),
    Family("beit_cosine_schedule", UNILM, "beit/utils.py", schedule),
    Family("beit_layer_decay", UNILM, "beit/optim_factory.py", layer_decay),
)
