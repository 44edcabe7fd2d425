"""Learning rates: MAE's and timm's schedules, and layer-wise decay with weight-decay groups."""

import math
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
from halfseen.models.hierarchical import TimmConfig, TimmTrunk
from halfseen.pretrain.distill.config import Distillation
from halfseen.pretrain.distill.student import Distilled

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
    old = tuple(int(part) for part in (case.meta.get("timm") or "1.0").split(".")[:2]) < (0, 5)
    checks = []
    for number, table in enumerate(case.meta["data"]):
        args = table["args"]
        options, epochs = timm_options(table["constructor"], args, old)
        bases = (args["lr"], args["lr"] / 2)
        actual: list[float] = []
        expected: list[float] = []
        for time, rates in table["rows"]:
            if time == "init" and not options["warmup"]:
                actual += bases  # without a warm-up nothing is set before the first step
            else:
                now = 0 if time == "init" else time
                actual += [(old_cosine if old else optim.timm_cosine)(now, base, **options) for base in bases]
            expected += rates
        checks.append(numbers(f"data/{number}", actual, expected))
        if table["total_epochs_returned"] is not None:
            checks.append(numbers(f"data/{number}/total_epochs", [epochs], [table["total_epochs_returned"]]))
    return checks


def old_cosine(time: float, peak: float, *, cycle_decay: float, **options: Any) -> float:
    """As timm's cosine before 0.5: its cycles lower the floor too, except the one that is left behind the last."""
    rate = optim.timm_cosine(time, peak, **options)
    left, length, cycle = time - (options["warmup"] if options.get("prefix") else 0), options["length"], 0
    while left >= length:
        left, length, cycle = left - length, length * options["cycle_stretch"], cycle + 1
    return rate * cycle_decay**cycle if time >= options["warmup"] and cycle < options["cycles"] else rate


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
        "cycles": ("lr_cycle_limit",),
        "cycle_stretch": ("lr_cycle_mul",),
        "cycle_decay": ("lr_cycle_decay",),
        "k_decay": ("lr_k_decay",),
    },
    "create_scheduler_v2": {
        "length": ("num_epochs",),
        "warmup": ("warmup_epochs",),
        "start": ("warmup_lr",),
        "floor": ("min_lr",),
        "prefix": ("warmup_prefix",),
        "cycles": ("cycle_limit",),
        "cycle_stretch": ("cycle_mul",),
        "cycle_decay": ("cycle_decay",),
        "k_decay": ("k_decay",),
    },
}
FACTORY = {"start": 1e-5, "cycle_decay": 0.1}  # defaults of the two functions that differ from the class's
# For other schedules, or read where they are needed; times are in the scheduler's own unit.
IGNORED = {"lr", "t_in_epochs", "sched", "cooldown_epochs", "decay_epochs", "patience_epochs", "decay_rate"}
IGNORED |= {"lr_noise_pct", "lr_noise_std", "noise_pct", "noise_std", "noise_seed", "seed"}
IGNORED |= {"step_on_epochs", "sched_on_updates", "updates_per_epoch", "decay_milestones", "initialize"}


def timm_options(constructor: str, args: Mapping[str, Any], old: bool) -> tuple[dict[str, Any], float]:
    """Our timm_cosine's options for a constructor of timm, before 0.5 if old, and the epochs of the run it returns."""
    if constructor not in CONSTRUCTORS:
        raise ValueError(f"constructor {constructor!r} is not known")
    if args.get("sched", "cosine") != "cosine":
        raise ValueError(f"sched={args['sched']!r}: only the cosine is implemented")
    read = CONSTRUCTORS[constructor]
    refuse_unknown(args, {name for given in read.values() for name in given} | IGNORED)
    function = constructor != "CosineLRScheduler"
    options: dict[str, Any] = {"warmup": 0, "cycles": 1, "cycle_stretch": 1.0, "cycle_decay": 1.0}
    options |= FACTORY if function else {"cycles": 0 if old else 1}
    for ours, theirs in read.items():
        given = [args[name] for name in theirs if name in args]
        options |= {ours: given[0]} if given else {}
    if old and function:
        options["cycle_decay"] = args.get("decay_rate", 1.0)
    length = sum(options["length"] * options["cycle_stretch"] ** cycle for cycle in range(max(1, options["cycles"])))
    epochs = math.floor(length + 1e-9) + (options["warmup"] if options.get("prefix") else 0)
    epochs += args.get("cooldown_epochs", 0)
    if old:
        options["cycles"] = options["cycles"] or math.inf
    unit = 1 if args.get("step_on_epochs", not args.get("sched_on_updates", False)) else args["updates_per_epoch"]
    return options | {name: options[name] * unit for name in ("length", "warmup")}, epochs


def layer_decay(case: Case) -> list[Check]:
    """Rate scale and weight decay of every parameter, and plain groups where the case has them."""
    config, data = case.config, case.meta["data"]
    refuse_unknown(config, ("model", "layer_decay", "weight_decay", "no_weight_decay"))
    rule: Literal["timm", "mae"] = "timm" if case.meta["repo"] == TIMM else "mae"
    layered_data = data.get("layer_decay", data)
    student = classifier(config["model"], "mean" if "fc_norm.weight" in layered_data else "class")
    cfg = Optim(weight_decay=config["weight_decay"], layer_decay=config["layer_decay"])
    exempt = {name.rpartition(".")[2] for name in config["no_weight_decay"]}
    layer_of = optim.trunk_layers(student.encoder.depth, rule)
    layout = LAYOUTS["timm_beit" if config["model"].startswith("beit") else rule]
    if isinstance(student.encoder, TimmTrunk):
        layer_of, layout = student.layer_of, LAYOUTS["timm_hierarchical"]
    layered = optim.groups(student, cfg, layer_of, layer_of("head.weight"), exempt)
    checks = compare_groups("layer_decay", layered, layered_data, layout)
    if "plain" in data:
        plain = optim.groups(student, Optim(weight_decay=config["weight_decay"]), exempt=exempt)
        expected = {name: [1.0, decay] for name, decay in data["plain"].items()}
        checks += compare_groups("plain", plain, expected, layout)
    return checks


def compare_groups(title: str, groups: list[optim.Group], expected: Mapping[str, Any], layout: Layout) -> list[Check]:
    """Rate scale and decay of every parameter, under the original's names."""
    actual = {name: [group.lr_scale, group.weight_decay] for group in groups for name in group.names}
    table = layout.from_ours(set(actual))
    theirs = {table[name]: values for name, values in actual.items()}
    both = sorted(theirs.keys() & expected.keys())
    flat, wanted = ([value for name in both for value in side[name]] for side in (theirs, expected))
    return [names(f"data/{title}/names", theirs, expected), numbers(f"data/{title}", flat, wanted)]


# What sets the models of timm's names apart from a plain ViT.
KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "deit3": {"layer_scale": 1e-6, "position_on_class": False},
    "beit": {"layer_scale": 0.1, "position": "none", "relative": "block", "key_bias": False},
    "beitv2": {"layer_scale": 1e-5, "position": "none", "relative": "block", "key_bias": False},
}
NAME = r"([a-z]+\d?)_([a-z]+)(_distilled)?_patch(\d+)(?:_(\d+)x(\d+))?(?:_(\d+))?(?![\dx])"


def classifier(text: str, pool: Literal["mean", "class"]) -> Classifier:
    """The model that a case names, e.g. ``vit_base_patch16_224, 10 classes``, without memory for its weights."""
    named = re.search(r"(\d+) classes", text)
    classes, task = int(named[1]) if named else 1000, Task(pool=pool)
    found = re.match(NAME, text)
    if not found or found[1] not in KINDS or found[2] not in SIZES:
        return of_timm(text, classes)
    kind, size, distilled, patch, depth, branches, side = found.groups()
    model = Model(size=SIZES[size], patch=int(patch), distillation_token=bool(distilled), **KINDS[kind])
    if depth:
        model.depth, model.parallel, model.layer_scale = int(depth), int(branches), 1e-5
    with torch.device("meta"):
        trunk = ViT(model, int(side or 224))
        return Distilled(trunk, task, classes, Distillation()) if distilled else Classifier(trunk, task, classes)


def of_timm(text: str, classes: int) -> Classifier:
    """The same of a trunk of several resolutions. Raises ConfigError if timm has none of that name."""
    name = text.partition(",")[0].strip()
    size = int(found[1]) if (found := re.search(r"_(\d{3,})$", name)) else 224
    with torch.device("meta"):
        return Classifier(TimmTrunk(TimmConfig(name=name), size), Task(pool="norm_mean"), classes)


FAMILIES = (
    Family("mae_lr", MAE, "util/lr_sched.py", mae_schedule),
    Family("mae_layer_decay", MAE, "util/lr_decay.py", layer_decay),
    Family("timm_schedule", TIMM, "timm/scheduler/cosine_lr.py", timm_schedule),
    Family("timm_layer_decay", TIMM, "timm/optim/_param_groups.py", layer_decay),
)
