"""Learning rates: MAE's and timm's schedules, and layer-wise decay with weight-decay groups."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from halfseen import optim
from halfseen.classification import Task
from halfseen.classification.classifier import Classifier
from halfseen.config import Model, Optim
from halfseen.layouts import LAYOUTS, Layout
from halfseen.models import ViT

from .golden import Case, Check, Family, names, number_in, numbers, refuse_unknown

MAE, TIMM = "facebookresearch/mae", "huggingface/pytorch-image-models"
SIZES: dict[str, Literal["ti", "s", "b", "l", "h", "g"]]
SIZES = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h", "giant": "g"}
EPOCH = 1_281_167  # images; any number will do, rates depend on the share of the run alone


def mae_schedule(case: Case) -> list[Check]:
    """Rates of a plain and of a scaled group at fractional epochs."""
    scale = number_in(" ".join(case.meta["notes"]), r"lr_scale is ([0-9.]+)")
    checks = []
    for number, table in enumerate(case.meta["data"]):
        args = table["args"]
        refuse_unknown(args, ("lr", "min_lr", "warmup_epochs", "epochs"))
        cfg = Optim(base_lr=None, lr=args["lr"], min_lr=args["min_lr"])
        schedule = optim.Schedule(cfg, args["lr"], args["warmup_epochs"] * EPOCH, args["epochs"] * EPOCH)
        parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("plain", "scaled")}
        groups = [optim.Group("plain", ["plain"]), optim.Group("scaled", ["scaled"], lr_scale=scale)]
        optimizer = optim.build(cfg, groups, parameters)
        actual, expected = [], []
        for epoch, *rates in table["rows"]:
            optim.set_rate(optimizer, schedule.rate(epoch * EPOCH))
            actual += [group["lr"] for group in optimizer.param_groups]
            expected += rates
        checks.append(numbers(f"data/{number}", actual, expected, atol=1e-18))
    return checks


def timm_schedule(case: Case) -> list[Check]:
    """Every row of every table, and the number of epochs the constructor returned."""
    checks = []
    for number, table in enumerate(case.meta["data"]):
        args = table["args"]
        options, epochs = timm_options(table["constructor"], args)
        bases = (args["lr"], args["lr"] / 2)
        actual: list[float] = []
        expected: list[float] = []
        for time, rates in table["rows"]:
            if time == "init" and not options["warmup"]:
                actual += bases  # without a warm-up nothing is set before the first step
            else:
                now = 0 if time == "init" else time
                actual += [optim.timm_cosine(now, base, **options) for base in bases]
            expected += rates
        checks.append(numbers(f"data/{number}", actual, expected))
        if table["total_epochs_returned"] is not None:
            checks.append(numbers(f"data/{number}/total_epochs", [epochs], [table["total_epochs_returned"]]))
    return checks


# What each of timm's constructors calls our options; the first name that is given counts.
CONSTRUCTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "CosineLRScheduler": {
        "length": ("t_initial",),
        "warmup": ("warmup_t",),
        "start": ("warmup_lr_init",),
        "floor": ("lr_min",),
        "prefix": ("warmup_prefix",),
        "cycles": ("cycle_limit",),
        "cycle_stretch": ("cycle_mul", "t_mul"),
        "cycle_decay": ("cycle_decay", "decay_rate"),
        "k_decay": ("k_decay",),
    },
    "create_scheduler": {
        "length": ("epochs",),
        "warmup": ("warmup_epochs",),
        "start": ("warmup_lr",),
        "floor": ("min_lr",),
        "prefix": ("warmup_prefix",),
    },
    "create_scheduler_v2": {
        "length": ("num_epochs",),
        "warmup": ("warmup_epochs",),
        "start": ("warmup_lr",),
        "floor": ("min_lr",),
        "prefix": ("warmup_prefix",),
    },
}
# Without effect on a cosine's rows: times are in the scheduler's own unit, the rest is for other schedules.
IGNORED = {"lr", "t_in_epochs", "sched", "cooldown_epochs", "decay_epochs", "patience_epochs", "decay_rate"}
IGNORED |= {"lr_noise_pct", "lr_noise_std", "noise_pct", "noise_std", "noise_seed", "seed"}


def timm_options(constructor: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Our timm_cosine's options for one of timm's constructors, and the epochs of the run it returns."""
    if constructor not in CONSTRUCTORS:
        raise ValueError(f"constructor {constructor!r} is not known")
    if args.get("sched", "cosine") != "cosine":
        raise ValueError(f"sched={args['sched']!r}: only the cosine is implemented")
    read = CONSTRUCTORS[constructor]
    refuse_unknown(args, {name for given in read.values() for name in given} | IGNORED)
    options: dict[str, Any] = {"warmup": 0, "cycles": 1}
    for ours, theirs in read.items():
        given = [args[name] for name in theirs if name in args]
        options |= {ours: given[0]} if given else {}
    epochs = options["length"] + (options["warmup"] if options.get("prefix") else 0)
    return options, epochs + args.get("cooldown_epochs", 0)


def layer_decay(case: Case) -> list[Check]:
    """Rate scale and weight decay of every parameter, and plain groups where the case has them."""
    config, data = case.config, case.meta["data"]
    refuse_unknown(config, ("model", "layer_decay", "weight_decay", "no_weight_decay"))
    rule: Literal["timm", "mae"] = "timm" if case.meta["repo"] == TIMM else "mae"
    student = classifier(config["model"])
    cfg = Optim(weight_decay=config["weight_decay"], layer_decay=config["layer_decay"])
    depth, exempt = student.encoder.depth, config["no_weight_decay"]
    layered = optim.groups(student, cfg, optim.trunk_layers(depth, rule), depth + 1, exempt)
    checks = compare_groups("layer_decay", layered, data.get("layer_decay", data), LAYOUTS[rule])
    if "plain" in data:
        plain = optim.groups(student, Optim(weight_decay=config["weight_decay"]), exempt=exempt)
        expected = {name: [1.0, decay] for name, decay in data["plain"].items()}
        checks += compare_groups("plain", plain, expected, LAYOUTS[rule])
    return checks


def compare_groups(title: str, groups: list[optim.Group], expected: Mapping[str, Any], layout: Layout) -> list[Check]:
    """Rate scale and decay of every parameter, under the original's names."""
    actual = {name: [group.lr_scale, group.weight_decay] for group in groups for name in group.names}
    table = layout.from_ours(set(actual))
    theirs = {table[name]: values for name, values in actual.items()}
    both = sorted(theirs.keys() & expected.keys())
    flat, wanted = ([value for name in both for value in side[name]] for side in (theirs, expected))
    return [names(f"data/{title}/names", theirs, expected), numbers(f"data/{title}", flat, wanted)]


def classifier(text: str) -> Classifier:
    """The model that a case names, e.g. ``vit_base_patch16 global_pool``, without memory for its weights."""
    found = re.match(r"vit_([a-z]+)_patch(\d+)(?:_(\d+))?", text)
    if not found or found[1] not in SIZES:
        raise ValueError(f"model {text!r} is not a plain ViT of a known size")
    classes = re.search(r"(\d+) classes", text)
    model = Model(size=SIZES[found[1]], patch=int(found[2]))
    task = Task(pool="mean" if "global_pool" in text else "class")
    with torch.device("meta"):
        return Classifier(ViT(model, int(found[3] or 224)), task, int(classes[1]) if classes else 1000)


FAMILIES = (
    Family("mae_lr", MAE, "util/lr_sched.py", mae_schedule),
    Family("mae_layer_decay", MAE, "util/lr_decay.py", layer_decay),
    Family("timm_schedule", TIMM, "timm/scheduler/cosine_lr.py", timm_schedule),
    Family("timm_layer_decay", TIMM, "timm/optim/_param_groups.py", layer_decay),
)
