"""What weights say of the model they belong to, and how a run that starts from them takes its trunk from there.

A run says it in its config.yaml; a file in its header, if `halfseen export`, `convert` or `delta` wrote it, or if it
lies in a run folder.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml

from halfseen.checkpoint.read import header, last_stage
from halfseen.config import ConfigError, Model
from halfseen.models.sizes import resolve
from halfseen.models.trunks import SECTIONS, section_in
from halfseen.recipes import Config, load, stage_of, stated

CONFIG = "config.yaml"
# Of a training, not of the weights: never taken over, free to differ. Swin's tables are fitted to another window.
OWN = {f"{name}.drop_path" for name, _ in SECTIONS.values()}
OWN |= {"model.drop_path_shape", "model.attention_dropout", "swin.window"}
DIMENSIONS = ("width", "depth", "heads", "patch", "mlp_ratio")  # what model.size stands for
EITHER = ("position_on_class", "class_token", "distillation_token", "registers")  # rows and tokens come and go
# What is asked for, and what the weights were made with.
FITTED = {
    "position": {("learned", "sincos"), ("sincos", "learned"), ("learned", "none"), ("sincos", "none")},
    "relative": {("block", "shared"), ("block", "none"), ("shared", "none")},
}


@dataclass(frozen=True)
class Origin:
    """Weights, and the config they were trained or written with, as plain values: stage, trunk, model, data, ..."""

    weights: Path  # a folder or file for ``read_weights``
    said: dict[str, Any]


def of(path: Path) -> Origin | None:
    """What a run, a checkpoint or a weight file says of itself; None if nothing does. ConfigError for a broken file."""
    if path.is_dir():
        weights = last_stage(path)
        stored = config_of(weights)
        return None if stored is None else Origin(weights, plain(stored))
    if not path.is_file():
        return None
    told = header(path)
    config = told.get("config") or json.loads(told.get("header", "{}")).get("config")  # the latter in a delta file
    if config:
        return Origin(path, dict(yaml.safe_load(config)))
    if "architecture" in told:
        return Origin(path, converted(told))
    beside = path.parent / CONFIG
    said = plain(beside) if beside.is_file() else {}
    return Origin(path, said) if "stage" in said else None


def require(key: str, path: Path) -> Origin:
    """As ``of``; ConfigError under that key for what is not there, and where nothing is said."""
    if not path.exists():
        raise ConfigError(key, str(path), "there is no such file or folder", "check the path")
    found = of(path)
    if found is None:
        reason = "does not say what its trunk is: " + ("no config.yaml is there" if path.is_dir() else "no header does")
        raise ConfigError(key, str(path), reason, "name a run folder, or a file of `halfseen export` or `convert`")
    return found


def config_of(folder: Path) -> Path | None:
    """The config.yaml of a run folder, or of the run that a checkpoint lies in, two levels below it."""
    return next((at / CONFIG for at in (folder, *folder.resolve().parents[:2]) if (at / CONFIG).is_file()), None)


def plain(config: Path) -> dict[str, Any]:
    """A run's config.yaml."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError("config.yaml", str(config), "is no run's config", "name a run folder")
    return content


def converted(told: Mapping[str, str]) -> dict[str, Any]:
    """The header of a file of `halfseen convert` in the words of a config."""
    architecture = json.loads(told["architecture"])
    said = {"trunk": architecture["trunk"], SECTIONS[architecture["trunk"]][0]: architecture["model"]}
    said |= {"data": {"image_size": architecture["image_size"]}, "augment": json.loads(told.get("normalisation", "{}"))}
    return said | ({"stage": told["stage"]} if "stage" in told else {})


# ------------------------------------------------------------------------------------------------ taking over


def adopted(schema: type[Config], recipe: Path, overrides: Sequence[str]) -> Config:
    """The config of a recipe whose trunk is that of run.init, so far as those weights say what it is."""
    options = dict(stated(schema, recipe, overrides))
    stage = schema.__name__.lower()
    init, folder = options.get("run.init"), Path(options.get("run.folder") or default_folder(recipe, stage))
    if not init:
        return load(schema, recipe, overrides)
    own = folder / CONFIG
    if own.is_file() and stage_of(own) == stage:  # it goes on, wherever those weights are now
        return load(schema, recipe, overrides, [inherited(options, plain(own))])
    try:
        found = of(Path(init))
    except ConfigError as refused:
        raise ConfigError("run.init", init, refused.reason, refused.fix) from refused
    if found is None:
        return load(schema, recipe, overrides)
    config: Any = load(schema, recipe, overrides, [inherited(options, found.said)])
    if config.run.init_coverage > 0:
        refuse_other_trunk(config, options, found)
    return cast(Config, config)


def default_folder(recipe: Path, stage: str) -> Path:
    """Where a recipe runs if nobody says: runs/NAME, or runs/NAME_STAGE if a run of another stage is in there.

    So `finetune/mae_b16` may start from runs/mae_b16, which `pretrain/mae_b16` has made.
    """
    folder = Path("runs") / recipe.stem
    config = folder / CONFIG
    return folder.with_name(f"{recipe.stem}_{stage}") if config.is_file() and stage_of(config) != stage else folder


def inherited(keys: Collection[str], said: Mapping[str, Any]) -> dict[str, Any]:
    """Sections that a config takes from what its weights say: the trunk, and the mean and deviation of its pixels.

    keys: dotted options that the config states itself; those stay. A stated model.size stands for all dimensions.
    """
    kind = said.get("trunk", "vit")
    section = SECTIONS[kind][0]
    own = {*keys, *(f"model.{name}" for name in DIMENSIONS if "model.size" in keys)}
    taken: dict[str, Any] = {} if kind == "vit" else {"trunk": kind}
    for name, options in ((section, said.get(section) or {}), ("augment", statistics(said))):
        taken[name] = {key: value for key, value in options.items() if f"{name}.{key}" not in own | OWN}
    return {key: value for key, value in taken.items() if key not in keys}


def statistics(said: Mapping[str, Any]) -> dict[str, Any]:
    """The mean and deviation of pixels, where they are said."""
    return {name: value for name, value in (said.get("augment") or {}).items() if name in ("mean", "std")}


def refuse_other_trunk(config: Any, keys: Collection[str], origin: Origin) -> None:
    """Raise ConfigError if a config states a trunk that is not the one of the weights it starts from.

    Equal shapes would hide it: other heads or norms compute something else with the same weights.
    """
    refuse_other_kind(config, keys, origin)
    section = SECTIONS[origin.said.get("trunk", "vit")][0]
    asked, given = getattr(config, section), section_in(origin.said)
    sizes: tuple[dict[str, Any], ...] = ({}, {})
    if isinstance(asked, Model) and isinstance(given, Model):
        sizes = vars(resolve(asked)), vars(resolve(given))
    for name in (part.name for part in fields(asked)):
        key, mine, theirs = f"{section}.{name}", getattr(asked, name), getattr(given, name)
        if name in sizes[0]:
            mine, theirs = sizes[0][name], sizes[1][name]
            key = key if key in keys else "model.size"
        elif key in OWN or (sizes[0] and name == "size") or fits(name, mine, theirs):
            continue
        if key in keys and mine != theirs:
            reason = f"run.init is {origin.weights}, whose trunk has {name} {theirs!r}"
            reason += f", not {mine!r}" if key == "model.size" else ""
            fix = f"leave {key} out: the trunk is taken from there; or run.init_coverage=0 if another one is meant"
            raise ConfigError(key, stated_value(config, key), reason, fix)


def refuse_other_kind(config: Any, keys: Collection[str], origin: Origin) -> None:
    """Raise ConfigError if a config describes a trunk of another kind than that of the weights."""
    kind = origin.said.get("trunk", "vit")
    section = SECTIONS[kind][0]
    others = {name for name, _ in SECTIONS.values()} - {section}
    foreign = [key for key in keys if key.partition(".")[0] in others and key not in OWN]
    if not foreign and kind == getattr(config, "trunk", "vit"):
        return
    key = next(iter(foreign), "trunk" if "trunk" in keys else "run.init")
    reason = f"the trunk of {origin.weights} is of the kind {kind}, which the section {section} describes"
    raise ConfigError(key, stated_value(config, key), reason, "leave the trunk out, or start from other weights")


def stated_value(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def fits(name: str, asked: Any, given: Any) -> bool:
    """Whether weights made with one value of an option are made to fit another (see halfseen/weights.py)."""
    if name == "layer_scale":
        return asked is not None  # what is given replaces the value at the start
    return name in EITHER or (asked, given) in FITTED.get(name, ())
