"""A fine-tuning in several stages: each with its own folder, config and checkpoints, each starting from the one before.

    stages:
      - {name: full}
      - {name: attention, init: best, task: {train: attention}, data: {image_size: 384}, run: {images: 20ep}}

What a stage does not say it takes from the recipe around it. Options of the command line count for every stage and
over what a stage says; ``stages.NAME.section.option=value`` counts for one.
"""

import gc
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from halfseen import delta, opening
from halfseen.checkpoint import read_weights
from halfseen.classification.evaluation import BEST
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.loop import Outcome
from halfseen.recipes import load, to_yaml
from halfseen.writing import write_whole

from .config import Finetune

PREFIX = "stages."
SUMMARY = "stages.json"  # in the run's folder: what has finished, with its numbers
ARTEFACT = "delta.safetensors"  # in a stage's folder: what it changed, relative to what it started from
INITS = ("last", "best", "ema")
RESERVED = ("stage", "stages")


@dataclass(frozen=True)
class Planned:
    """One stage: its name, and the whole config it runs with."""

    name: str
    config: Finetune

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return Path(self.config.run.folder)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without, and the part with, overrides of single stages."""
    own = [text for text in argv[1:] if text.startswith(PREFIX)]
    return [text for text in argv if text not in own], own


def plan(config: Finetune, folder: Path, overrides: Sequence[str] = (), own: Sequence[str] = ()) -> list[Planned]:
    """Every stage with its config, all of them checked before the first begins; none if the config has no stages.

    config.stages is brought to what the command line asks for, so that the stored config tells the whole story.
    """
    names = [name_of(entry, number) for number, entry in enumerate(config.stages)]
    if len(set(names)) < len(names):
        raise ConfigError("stages", names, "two stages have one name", "give each its own")
    chosen = [without(entry, [text.partition("=")[0] for text in overrides]) for entry in config.stages]
    for text in own:
        put(chosen, names, text)
    config.stages = chosen
    around = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(around, dict)
    planned: list[Planned] = []
    for number, (name, entry) in enumerate(zip(names, chosen)):
        init, sections = entry.get("init", "last"), {k: v for k, v in entry.items() if k not in ("name", "init")}
        refuse(name, init, sections, first=not planned)
        try:
            mine = load(Finetune, None, (), [{k: v for k, v in around.items() if k != "stages"}, sections])  # type: ignore[misc]
        except ConfigError as error:
            raise ConfigError(f"stages.{name}: {error.key}", error.value, error.reason, error.fix) from error
        mine.run.folder = str(folder / f"{number + 1}_{name}")
        if planned:
            follow(mine, planned[-1].config, init)
        planned.append(Planned(name, mine))
    return planned


def name_of(entry: dict[str, Any], number: int) -> str:
    """A stage's name; it becomes a folder's."""
    name = str(entry.get("name", ""))
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"stages[{number}].name", name, "is no name", "letters, digits, _ and -, e.g. attention_384")
    return name


def without(entry: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A stage's mapping without the dotted keys that the command line sets for all stages."""
    kept = {}
    for name, value in entry.items():
        if name in keys:
            continue
        inside = [key.partition(".")[2] for key in keys if key.startswith(f"{name}.")]
        kept[name] = without(value, inside) if isinstance(value, dict) and inside else value
    return kept


def put(entries: list[dict[str, Any]], names: Sequence[str], text: str) -> None:
    """Apply ``stages.NAME.section.option=value`` to that stage's mapping."""
    key, equals, value = text.removeprefix(PREFIX).partition("=")
    name, _, rest = key.partition(".")
    if name not in names or not equals or not rest:
        raise ConfigError("override", text, f"the stages are {list(names)}", "write stages.NAME.section.option=value")
    *path, last = rest.split(".")
    place = entries[names.index(name)]
    for part in path:
        place = place.setdefault(part, {})
    place[last] = yaml.safe_load(value) if value else ""


def refuse(name: str, init: Any, sections: dict[str, Any], first: bool) -> None:
    """Raise ConfigError for what a stage cannot say."""
    if init not in INITS:
        raise ConfigError(f"stages.{name}.init", init, "is no part of the stage before", f"one of {', '.join(INITS)}")
    for reserved in RESERVED:
        if reserved in sections:
            raise ConfigError(f"stages.{name}.{reserved}", sections[reserved], "cannot be said in a stage", "remove it")
    run = sections.get("run") or {}
    if "folder" in run or ("init" in run and not first):
        reason = "a stage's folder is in the run's, and it starts from the stage before"
        raise ConfigError(f"stages.{name}.run", run, reason, "say init: last, best or ema instead")


def follow(mine: Finetune, before: Finetune, init: str) -> None:
    """Start a stage from the one before."""
    folder = Path(before.run.folder)
    mine.run.init, mine.run.init_part = str(folder), "model"
    if init == "ema":
        if not before.engine.ema:
            raise ConfigError("engine.ema", 0.0, f"{folder.name} keeps no averages to go on from", "e.g. 0.9999")
        mine.run.init_part = "ema"
    if init == "best":
        if not before.data.val:
            raise ConfigError("data.val", None, f"{folder.name} is not evaluated, so has no best", "init: last")
        before.task.keep_best = True
        mine.run.init = str(folder / BEST)


def run(
    opened: opening.Opened[Finetune],
    planned: Sequence[Planned],
    world: World,
    train: Callable[[opening.Opened[Finetune], World], Outcome],
) -> Outcome:
    """Run what is not finished yet. Collective; a signal ends it, and the same command goes on in that stage."""
    folder, outcome = opened.folder, Outcome(0)
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", to_yaml(opened.config))
    world.barrier()
    for number, item in enumerate(planned):
        done = finished(folder)
        mine = opening.open_config(Finetune, item.config)
        head = f"stage     {number + 1} of {len(planned)}, {item.name}"
        if item.name in done:
            if world.main:
                print(f"{head}: done", flush=True)
            outcome = Outcome(done[item.name]["position"])
            continue
        if world.main:
            print(f"\n{head}", flush=True)
        outcome = train(mine, world)
        if outcome.stopped_by:
            return outcome
        gc.collect()  # the stage's engine is gone before the next one's is made
        if world.main:
            finish(folder, item, outcome)
        world.barrier()
    return outcome


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """What the summary says of the stages that have finished, by name."""
    path = folder / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else {}


def finish(folder: Path, item: Planned, outcome: Outcome) -> None:
    """Write a finished stage's artefact, and its line in the summary."""
    row: dict[str, Any] = {"position": outcome.position, "folder": item.folder.name}
    evaluation = item.folder / "evaluation.json"
    if evaluation.is_file():
        content = json.loads(evaluation.read_text())
        row |= {"last": content["last"]["val/top1"], "best": content["best"]["val/top1"]}
    run = item.config.run
    if run.init:
        base = read_weights(run.init, run.init_part)
        best = item.folder / BEST
        tensors, header = delta.make(base, read_weights(best if best.is_file() else item.folder))
        header.said, header.config = run.init, to_yaml(item.config)
        delta.write(item.folder / ARTEFACT, tensors, header)
        row["delta_bytes"] = (item.folder / ARTEFACT).stat().st_size
        share = row["delta_bytes"] / sum(value.numel() * value.element_size() for value in base.values())
        print(f"delta     {item.folder / ARTEFACT}: {row['delta_bytes']:,} bytes, {share:.1%} of what it started from")
    write_whole(folder / SUMMARY, json.dumps(finished(folder) | {item.name: row}, indent=1) + "\n")
